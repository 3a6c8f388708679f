"""PTQTP trit-planes: the entry that chooses between the native solver and the PyTorch reference.

"PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models", arXiv 2509.16989.

The published loop stops for a whole matrix at once: in the first iteration in which no group moved its scales by the
tolerance. Groups are independent otherwise, so each one runs to its exact fixed point, where it cannot move again, and
the iterations in which any group moved are recorded for the matrix. The first iteration t* >= 2 without movement is
where the published loop stops; the few groups that reached their fixed point later are solved again through iteration
t*. The result is that of the loop over all groups, and depends neither on threads nor on how the matrix was cut into
windows. (Iteration 1 has no scales before it to be compared with: the initial value 1 takes no part in the algorithm.)

With several starts there is no such stop, as there is no published loop to follow: every group runs to its fixed point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.native import library
from featherweight.native import ptqtp_reference as reference
from featherweight.native.choice import Backend, may_be_native
from featherweight.native.packing import Packing, pack_trits, packed_bytes, unpack_trits
from featherweight.native.ptqtp_reference import Window
from featherweight.native.ptqtp_settings import (
    NonFiniteWeightError,
    TieOrder,
    TritPlaneSettings,
    TritPlaneSolution,
    join_trits,
    split_codes,
)

__all__ = [
    "NonFiniteWeightError",
    "TieOrder",
    "TritPlaneSettings",
    "TritPlaneSolution",
    "TritPlaneStream",
    "assign_trits",
    "solve_trit_planes",
]

# Rows in a window start at a multiple of this, so that packed bytes (5 or 4 trits) never straddle two windows.
ROW_ALIGNMENT = 20


class _Solver(Protocol):
    def solve(self, weight: Tensor, settings: TritPlaneSettings, cap: int) -> Window: ...

    def resolve(self, weight: Tensor, settings: TritPlaneSettings, cap: int, window: Window) -> None: ...

    def assign(self, weight: Tensor, scales: Tensor, settings: TritPlaneSettings) -> Tensor: ...


class _Reference:
    """The PyTorch solver."""

    def solve(self, weight: Tensor, settings: TritPlaneSettings, cap: int) -> Window:
        return reference.solve_window(weight, settings, cap)

    def resolve(self, weight: Tensor, settings: TritPlaneSettings, cap: int, window: Window) -> None:
        rows = (window.steps > cap).any(-1).nonzero().flatten()
        again = _placed(reference.solve_window(weight[rows.to(weight.device)], settings, cap), window.codes.device)
        window.codes[rows], window.scales[rows], window.steps[rows] = again.codes, again.scales, again.steps

    def assign(self, weight: Tensor, scales: Tensor, settings: TritPlaneSettings) -> Tensor:
        return reference.assign_window(weight, scales, settings)


class _Native:
    """The native solver with a number of threads."""

    def __init__(self, native: library.NativeLibrary, threads: int | None) -> None:
        self.native, self.threads = native, threads

    def solve(self, weight: Tensor, settings: TritPlaneSettings, cap: int) -> Window:
        return self.native.solve_window(weight, settings, cap, self.threads)

    def resolve(self, weight: Tensor, settings: TritPlaneSettings, cap: int, window: Window) -> None:
        self.native.solve_window(weight, settings, cap, self.threads, window)

    def assign(self, weight: Tensor, scales: Tensor, settings: TritPlaneSettings) -> Tensor:
        return self.native.assign_window(weight, scales, settings, self.threads)


def solve_trit_planes(
    weight: Tensor,
    settings: TritPlaneSettings | None = None,
    threads: int | None = None,
    backend: Backend = "auto",
    scale_dtype: torch.dtype = torch.float16,
) -> TritPlaneSolution:
    """Split a matrix into trit-planes.

    Parameters
    ----------
    weight : [n, d], float32, bfloat16, float16 or float64. A group is `group_size` consecutive columns. On another
        device than the CPU the PyTorch reference solves there, and the result stays there.
    settings : the published algorithm by default.
    threads : of the native solver; None for the default of `library.thread_count`. Never changes the result.
    backend : "native" raises RuntimeError without the library; "auto" falls back to the PyTorch reference.
    scale_dtype : what the closing step rounds the scales to; without `settings.closing` it has no effect.

    Raises NonFiniteWeightError (row and column) for NaN or infinite weights, ValueError for a wrong shape or dtype.
    """
    settings = settings or TritPlaneSettings()
    _check_matrix(weight)
    solver = _solver(backend, threads, weight)
    window = solver.solve(weight, settings, settings.max_iterations)
    stop = _stop(window.moving, window.steps, settings)
    if bool((window.steps > stop).any()):
        solver.resolve(weight, settings, stop, window)
    codes, scales = window.codes, window.scales
    if settings.closing:
        scales = _stored(scales, scale_dtype, 0, settings).to(torch.float64)
        codes = solver.assign(weight, scales, settings)
    return TritPlaneSolution(codes, scales, window.steps, stop, settings.planes, settings.group_size)


def assign_trits(
    weight: Tensor,
    scales: Tensor,
    settings: TritPlaneSettings,
    threads: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The trit step alone: joint codes uint8 [n, d] nearest to a weight [n, d] for given scales.

    Scales are [n, g, K], tied [n, g], of any floating dtype. A plane whose scale is 0 gets no trits. Raises as
    `solve_trit_planes`.
    """
    _check_matrix(weight)
    reference.check_finite(weight)
    n, groups = weight.shape[0], -(-weight.shape[1] // settings.group_size)
    expected = (n, groups) if settings.tied else (n, groups, settings.planes)
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales must be {list(expected)}, not {list(scales.shape)}")
    return _solver(backend, threads, weight).assign(weight, scales.to(torch.float64), settings)


class TritPlaneStream:
    """The same for a matrix that arrives in windows of rows, keeping what is stored and one byte a group.

    Windows may be on any device, and are solved there; what is kept is in main memory.
    Windows may come in any order, each row once. A window starts at a multiple of 20 rows and, unless it ends the
    matrix, has a multiple of 20 rows. `finish` reads again the rows that hold groups which the stopping rule of the
    whole matrix would have stopped earlier, and solves those groups alone. The result equals that of
    `solve_trit_planes` with rounded scales, packed.
    """

    def __init__(
        self,
        n: int,
        d: int,
        settings: TritPlaneSettings | None = None,
        *,
        scale_dtype: torch.dtype = torch.float16,
        packing: Packing = "base3",
        threads: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.shape = (n, d)
        self.settings = settings or TritPlaneSettings()
        self.packing: Packing = packing
        self.scale_dtype = scale_dtype
        self._backend: Backend = backend
        self._threads = threads
        _solver(backend, threads)
        groups = -(-d // self.settings.group_size)
        scale_shape = (n, groups) if self.settings.tied else (n, groups, self.settings.planes)
        self._packed = torch.zeros(self.settings.planes, packed_bytes(n * d, packing), dtype=torch.uint8)
        self._scales = torch.zeros(scale_shape, dtype=torch.float64)
        self._steps = torch.zeros(n, groups, dtype=torch.uint8)
        self._moving = torch.zeros(self.settings.max_iterations + 1, dtype=torch.uint8)
        self._seen = torch.zeros(n, dtype=torch.bool)

    def add(self, first_row: int, window: Tensor) -> None:
        """Solve the rows [first_row, first_row + len(window)).

        ValueError for a wrong shape, alignment or a row that came before; NonFiniteWeightError with the row counted in
        the whole matrix.
        """
        _check_matrix(window)
        n, d = self.shape
        last = first_row + window.shape[0]
        if window.shape[1] != d or not 0 <= first_row < last <= n:
            raise ValueError(f"rows {first_row} to {last} of width {window.shape[1]} are not part of [{n}, {d}]")
        if first_row % ROW_ALIGNMENT or (last != n and last % ROW_ALIGNMENT):
            raise ValueError(
                f"a window must begin and end at a multiple of {ROW_ALIGNMENT} rows, not {first_row}:{last}"
            )
        if bool(self._seen[first_row:last].any()):
            raise ValueError(f"rows {first_row} to {last} overlap rows that were added before")
        try:
            solver = _solver(self._backend, self._threads, window)
            found = _placed(solver.solve(window, self.settings, self.settings.max_iterations), self._scales.device)
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(first_row + error.row, error.column) from None
        self._scales[first_row:last] = found.scales
        self._steps[first_row:last] = found.steps
        self._pack(first_row, self._closed(window, found, first_row))
        self._moving.logical_or_(found.moving)
        self._seen[first_row:last] = True

    def finish(self, read: Callable[[int, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Packed planes uint8 [K, bytes] and scales [n, g, K] (tied [n, g]) in the storage dtype.

        `read(first, last)` gives the rows [first, last) once more. ValueError if rows are missing.
        """
        if not bool(self._seen.all()):
            raise ValueError(f"row {int((~self._seen).to(torch.uint8).argmax())} was never added")
        stop = _stop(self._moving, self._steps, self.settings)
        later = (self._steps > stop).any(-1).nonzero().flatten() // ROW_ALIGNMENT
        for block in sorted(set(later.tolist())):
            first, last = block * ROW_ALIGNMENT, min((block + 1) * ROW_ALIGNMENT, self.shape[0])
            window = read(first, last)
            kept = Window(self._unpack(first, last), self._scales[first:last], self._steps[first:last], self._moving)
            _solver(self._backend, self._threads, window).resolve(window, self.settings, stop, kept)
            self._pack(first, self._closed(window, kept, first))
        self.iterations = stop
        return self._packed, _stored(self._scales, self.scale_dtype, 0, self.settings)

    def _closed(self, window: Tensor, found: Window, first_row: int) -> Tensor:
        """Codes after the closing step, or as they are without one. RecipeError where a scale cannot be stored."""
        scales = _stored(found.scales, self.scale_dtype, first_row, self.settings)
        if not self.settings.closing:
            return found.codes
        solver = _solver(self._backend, self._threads, window)
        return solver.assign(window, scales.to(window.device, torch.float64), self.settings).cpu()

    def _bytes(self, first: int, last: int) -> slice:
        """Where the packed trits of some rows lie in each plane."""
        d = self.shape[1]
        return slice(packed_bytes(first * d, self.packing), packed_bytes(last * d, self.packing))

    def _pack(self, first: int, codes: Tensor) -> None:
        """Store the codes of rows from `first`, a multiple of 20, on."""
        place = self._bytes(first, first + codes.shape[0])
        native = library.get() if may_be_native(self._backend) else None
        if native is not None:
            native.pack_codes(codes, self.packing, self._packed, place.start)
            return
        for k, plane in enumerate(split_codes(codes, self.settings.planes)):
            self._packed[k, place] = pack_trits(plane, self.packing)

    def _unpack(self, first: int, last: int) -> Tensor:
        """The codes of some rows as they are stored."""
        shape = (last - first, self.shape[1])
        planes = self._packed[:, self._bytes(first, last)]
        return join_trits(torch.stack([unpack_trits(p, shape[0] * shape[1], self.packing).view(shape) for p in planes]))


def _placed(window: Window, device: torch.device) -> Window:
    return Window(*(tensor.to(device) for tensor in window))


def _solver(backend: Backend, threads: int | None, weight: Tensor | None = None) -> _Solver:
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be 'auto', 'native' or 'reference', not {backend!r}")
    native = library.get() if may_be_native(backend, weight) else None
    if native is None and backend == "native":
        raise RuntimeError("the native library of featherweight is not available here; use backend='reference'")
    return _Reference() if native is None else _Native(native, threads)


def _stop(moving: Tensor, steps: Tensor, settings: TritPlaneSettings) -> int:
    """The iteration in which the published loop over the whole matrix stops."""
    if settings.one_scale:
        return 0
    if settings.starts > 1:
        return int(steps.max())
    still = (moving[2:] == 0).nonzero()
    return min(2 + int(still[0]), settings.max_iterations) if len(still) else settings.max_iterations


def _stored(scales: Tensor, dtype: torch.dtype, first_row: int, settings: TritPlaneSettings) -> Tensor:
    """Scales rounded to the storage dtype; RecipeError if one is too large for it."""
    rounded = scales.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        bad = int((~torch.isfinite(rounded)).reshape(rounded.shape[0], -1).any(-1).to(torch.uint8).argmax())
        raise RecipeError(
            f"a scale of row {first_row + bad} is {float(scales[bad].abs().max()):.3g}, more than "
            f"{str(dtype).removeprefix('torch.')} can hold; store the scales as float32"
        )
    return rounded


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"a weight must be a non-empty matrix, not {list(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"a weight must be float32, bfloat16, float16 or float64, not {weight.dtype}")
