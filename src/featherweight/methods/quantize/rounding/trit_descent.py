"""Trit-planes under the inputs' second moment: a Hessian sweep, then joint least squares and coordinate descent.

Unpublished elsewhere. For a row w with joint codes c and scales s of all its groups, the error (w - q(s, c)) H (w - q)'
is quadratic in s and, for fixed s, a closest-vector problem in c. Starting from the sweep, each round

1. solves for all scales of a row together (least squares under the whole of H), rounds them to their stored form, and
   descends over that form one scale at a time, so that each makes up for the rounding of the others;
2. descends over the weights: each takes the best of its 3^K values given all others, exactly, and pairs of weights move
   together (`featherweight.native.trit_descent`).

No step raises a row's error. With `alpha` the target is GPTAQ's W (I + alpha D H_d^-1) (arXiv 2504.02692, exact form).
All is done in the weight's dtype (float32; float64 for tests), the small systems and the descent in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, SolveOptions, WeightSource
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.native.ptqtp_settings import join_trits, split_codes
from featherweight.native.trit_descent import descend
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.trit_planes import TritPlanes

ROWS_AT_A_TIME = 1024
SCALE_PASSES = 3
BLOCK_ROUNDS = 6  # passes of single (and pair) moves inside a block of columns


NEEDED = "it needs the grid trit-planes"


@register("rounding", "trit-descent")
class TritDescent(Hessian):
    """A Hessian sweep whose outcome is improved by joint least squares of scales and coordinate descent over trits."""

    target: Literal["per-neuron", "shift"] = Field("shift", description="with alpha: the exact target is needed here")
    rounds: int = Field(4, ge=0, description="of joint least squares and descent; 0 leaves the sweep's result")
    passes: int = Field(2, ge=1, description="over all columns in a round, at most")
    pairs: bool = Field(True, description="also move two weights of a block at once, in the last round")
    descent_damping: float = Field(
        0.003, ge=0, description="added to the diagonal of H in the descent, as `damping` is"
    )
    descent_block: int = Field(256, ge=1, description="columns whose errors are kept up to date; the reach of pairs")

    @model_validator(mode="after")
    def _supported(self) -> TritDescent:
        if self.order in ("activation", "similarity"):
            raise ValueError("trit-descent needs whole groups: use order: none, group-aware or group-sum")
        if self.alpha > 0 and self.target != "shift":
            raise ValueError("trit-descent needs the exact target: use target: shift with alpha")
        return self

    def refusal(self, grid: Grid) -> str | None:
        return None if isinstance(grid, TritPlaneGrid) else NEEDED

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        return self.quantize_reported(source, grid, statistics, options)[0]

    def quantize_reported(
        self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions
    ) -> tuple[Code, dict[str, Any]]:
        if not isinstance(grid, TritPlaneGrid):
            raise RecipeError(f"rounding trit-descent: {NEEDED}, not {grid.kind!r}")
        result = self.solve(source, grid, statistics, options)
        report = result.report()
        if result.data_free or not isinstance(result.code, TritPlanes) or not self.rounds:
            return result.code, report
        weight = source.rows(0, source.shape[0]).float()
        failed = any(not attempt.succeeded for attempt in result.attempts)
        code, before, after = self.improve(
            self._target(weight, statistics), grid, result.code, statistics["gram"], options,
            max(self.descent_damping, result.damping) if failed else self.descent_damping,
        )  # fmt: skip
        source.release(0, source.shape[0])
        return code, report | {"descent_before": before, "descent_after": after}

    def _target(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """What the sweep aims at, in the columns' own order."""
        dead = ~(statistics["gram"].diagonal() > 0)
        weight = weight.masked_fill(dead, 0) if bool(dead.any()) else weight
        if not self.needs_cross:
            return weight
        gram = _damped(statistics["gram"].double(), self.damping)
        shift = torch.linalg.solve_ex(gram, (weight.double() @ statistics["cross"].double()).T)[0].T
        shifted = weight + self.alpha * shift.to(weight.dtype)
        return shifted if bool(torch.isfinite(shifted).all()) else weight

    def improve(
        self,
        target: Tensor,
        grid: TritPlaneGrid,
        code: TritPlanes,
        gram: Tensor,
        options: SolveOptions | None = None,
        damping: float | None = None,
    ) -> tuple[TritPlanes, float, float]:
        """A code no worse than `code` for target [out, in]; sum((w - q) H_d (w - q)') before and after."""
        options = options or SolveOptions()
        if grid.scale_dtype == "auto":
            grid = grid.model_copy(update={"scale_dtype": dtype_name(code.scales.dtype)})
        moment = _damped(gram.to(target.dtype), self.descent_damping if damping is None else damping)
        trits = code.unpack().to(target.device)
        scales = (code.scales.unsqueeze(-1) if code.tied else code.scales).to(target.device, copy=True)
        before = after = 0.0
        for first in range(0, len(target), ROWS_AT_A_TIME):
            part = slice(first, first + ROWS_AT_A_TIME)
            rows = _Rows(target[part], moment, grid, join_trits(trits[:, part]), scales[part].float(), options)
            before += rows.error()
            self._improve_rows(rows)
            after += rows.error()
            trits[:, part], scales[part] = rows.trits(), rows.scales.abs().to(scales.dtype)
        stored = scales.squeeze(-1) if code.tied else scales
        return grid.assemble(trits.cpu(), {"scales": stored.cpu()}), before, after

    def _improve_rows(self, rows: _Rows) -> None:
        for number in range(self.rounds):
            last = number == self.rounds - 1
            rows.solve_scales()
            for _ in range(self.passes):
                if not rows.descend(self.descent_block, self.pairs and last):
                    break
        rows.solve_scales()


@dataclass
class _Rows:
    """Some rows of a matrix: what they should be, and their codes and scales so far."""

    target: Tensor  # [out, in]
    gram: Tensor  # [in, in], damped
    grid: TritPlaneGrid
    codes: Tensor  # uint8 [out, in]: joint codes 0 .. 3^K - 1
    scales: Tensor  # float32 [out, groups, P], of either sign, |scales| as stored
    options: SolveOptions

    def __post_init__(self) -> None:
        self.columns = self.target.shape[1]
        self.size = min(self.grid.group_size, self.columns)
        self.groups = self.scales.shape[1]
        self.basis = self.grid.basis.to(self.target.device)  # [P, 3^K]
        self.aim = self.target @ self.gram

    def values(self) -> Tensor:
        """What the codes stand for: [out, in] in the target's dtype."""
        levels = self.scales @ self.basis
        grouped = levels.gather(-1, self._grouped(self.codes.long()))
        return grouped.view(len(self.target), -1)[:, : self.columns].to(self.target.dtype)

    def _grouped(self, matrix: Tensor) -> Tensor:
        padding = self.groups * self.size - self.columns
        return torch.nn.functional.pad(matrix, (0, padding)).view(len(matrix), self.groups, self.size)

    def error(self) -> float:
        residual = self.target - self.values()
        return float(((residual @ self.gram) * residual).sum(dtype=torch.float64))

    def trits(self) -> Tensor:
        """int8 [K, out, in] for positive scales."""
        trits = split_codes(self.codes, self.grid.planes)
        signs = self.scales.sign().to(torch.int8)  # [out, groups, P]
        signs = torch.where(signs == 0, 1, signs).repeat_interleave(self.size, 1)[:, : self.columns]
        return (trits * signs.movedim(-1, 0)).to(torch.int8)

    # ---- scales ----

    def solve_scales(self) -> None:
        """All scales of a row together, as they are stored; rows keep theirs where that is not better."""
        square, right = self._normal_equations()
        current = self.scales.reshape(len(square), -1).double()
        wide = square.diagonal(dim1=-2, dim2=-1)
        ridge = (1e-6 if self.target.dtype == torch.float32 else 1e-10) * wide.mean(-1, keepdim=True) + 1e-30
        factor, failed = torch.linalg.cholesky_ex(square + torch.diag_embed(ridge.expand_as(wide)))
        solved = torch.cholesky_solve((right + ridge * current).unsqueeze(-1), factor).squeeze(-1)
        usable = (failed == 0) & torch.isfinite(solved).all(-1)
        found = self._stored(torch.where(usable.unsqueeze(-1), solved, current))
        for _ in range(SCALE_PASSES):
            self._polish(found, square, right, wide)
        better = _quadratic(found, square, right) < _quadratic(current, square, right)
        chosen = torch.where(better.unsqueeze(-1), found, current)
        self.scales = chosen.float().view(self.scales.shape)

    def _stored(self, scales: Tensor) -> Tensor:
        """The nearest scales that can be stored, of either sign; float64."""
        return self.grid.rounded(scales.abs().float()).double() * scales.sign()

    def _polish(self, scales: Tensor, square: Tensor, right: Tensor, wide: Tensor) -> None:
        """One scale after another to the best stored value given the others; in place."""
        residual = right - (square @ scales.unsqueeze(-1)).squeeze(-1)
        for p in range(scales.shape[1]):
            curvature = wide[:, p]
            ideal = scales[:, p] + residual[:, p] / curvature.clamp_min(torch.finfo(torch.float64).tiny)
            step = self._stored(ideal) - scales[:, p]
            gain = step * (2 * residual[:, p] - step * curvature)
            step = torch.where((curvature > 0) & (gain > 0) & torch.isfinite(step), step, 0.0)
            scales[:, p] += step
            residual -= step.unsqueeze(1) * square[:, p]

    def _normal_equations(self) -> tuple[Tensor, Tensor]:
        """A H A' [out, U, U] and A H w' [out, U] in float64, U = groups x P unknowns, A the digits of each unknown."""
        rows, width, size = len(self.target), len(self.basis), self.size
        digits = [self._grouped(self.basis[p][self.codes.long()].to(self.target.dtype)) for p in range(width)]
        padding = self.groups * size - self.columns
        if padding:  # no column stands behind the padding
            for plane in digits:
                plane.view(rows, -1)[:, self.columns :] = 0
        gram = torch.nn.functional.pad(self.gram, (0, padding, 0, padding))
        aim = self._grouped(self.aim)
        shape = rows, self.groups, width, self.groups, width
        square = torch.zeros(shape, dtype=torch.float64, device=gram.device)
        right = torch.stack([(plane * aim).sum(-1) for plane in digits], -1).double()
        for group in range(self.groups):
            first = group * size
            for p in range(width):
                pushed = digits[p][:, group] @ gram[first : first + size, first:]
                pushed = pushed.view(rows, self.groups - group, size)
                for q in range(width):
                    products = (pushed * digits[q][:, group:]).sum(-1).double()
                    square[:, group, p, group:, q] = products
                    square[:, group:, q, group, p] = products
        unknowns = self.groups * width
        return square.view(rows, unknowns, unknowns), right.reshape(rows, unknowns)

    # ---- trits ----

    def descend(self, block: int, pairs: bool) -> int:
        """One pass over all columns. Returns the number of accepted moves."""
        levels, order = (self.scales @ self.basis).sort(dim=-1, stable=True)  # [out, groups, 3^K]
        place = order.argsort(-1)
        indices = self._flat(place.gather(-1, self._grouped(self.codes.long()))).to(torch.uint8)
        values = self.values()
        step, moves = max(1, block // self.size) * self.size, 0
        for first in range(0, self.columns, step):
            last = min(self.columns, first + step)
            gradient = ((self.target - values) @ self.gram[:, first:last]).double()
            inside = indices[:, first:last].contiguous()
            own = levels[:, first // self.size : -(-last // self.size)].contiguous()
            group_of = torch.arange(last - first, dtype=torch.int32, device=inside.device) // self.size
            moment = self.gram[first:last, first:last].double()
            _, changes = descend(
                moment, own, group_of, inside, gradient.contiguous(), BLOCK_ROUNDS,
                pairs=pairs, threads=self.options.threads, backend=self.options.backend,
            )  # fmt: skip
            moved = int(changes.sum())
            if moved:
                moves += moved
                indices[:, first:last] = inside
                chosen = own[:, group_of.long()].gather(-1, inside.long().unsqueeze(-1)).squeeze(-1)
                values[:, first:last] = chosen.to(values.dtype)
        self.codes = self._flat(order.gather(-1, self._grouped(indices.long()))).to(torch.uint8)
        return moves

    def _flat(self, grouped: Tensor) -> Tensor:
        return grouped.reshape(len(grouped), -1)[:, : self.columns]


def _damped(gram: Tensor, damping: float) -> Tensor:
    """H plus damping times the mean of its diagonal, symmetric."""
    moment = (gram + gram.T) / 2
    moment.diagonal().add_(damping * moment.diagonal().mean())
    return moment


def _quadratic(scales: Tensor, square: Tensor, right: Tensor) -> Tensor:
    """s M s' - 2 s b', the error of each row up to a constant: float64 [out]."""
    return ((square @ scales.unsqueeze(-1)).squeeze(-1) * scales).sum(-1) - 2 * (scales * right).sum(-1)
