"""Coordinate descent over the levels of a block of columns, the rest of the matrix as it is.

The objective of a row is (w - q) H (w - q)'. With its gradient g = (w - q) H (up to the factor -2), changing weight j
by d changes it by d (d H_jj - 2 g_j), and g by -d H_j. The best of all levels is therefore the one nearest to
q_j + g_j / H_jj: exact enumeration costs a search. A *pair* move takes weight i to its less costly neighbouring level
together with the best answer of one other weight by one level. A round is a pass of single moves over the columns
and, if asked for, a pass of pairs; rows are independent, and a row ends with a round that moved nothing.

Everything is float64. The native library gives the same bits as the PyTorch reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.choice import Backend, may_be_native

MOST_LEVELS = 256
LEAST_GAIN = 1e-10  # of a pair, as a share of d^2 H_ii of its first move, so that rounding alone moves nothing

ROWS_OF_A_THREAD = 16
TOGETHER = 1 << 24
"""Columns times columns times rounds that 16 rows go through in a fraction of a second."""


def descend(
    gram: Tensor,
    levels: Tensor,
    group_of: Tensor,
    indices: Tensor,
    gradient: Tensor,
    rounds: int,
    *,
    pairs: bool = False,
    threads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Change `indices` and `gradient` in place. Returns what each row's objective fell by, and its accepted moves.

    gram : float64 [columns, columns] block of H
    levels : float32 [out, groups, L], ascending, of the groups in the block
    group_of : int32 [columns]
    indices : uint8 [out, columns]
    gradient : float64 [out, columns], (w - q) H of these columns
    """
    block = _Block(gram, levels, group_of, indices, gradient)
    _check(block)
    native = _native() if may_be_native(backend, indices) else None
    if native is not None:
        return _descend_native(native, block, rounds, pairs, threads)
    if backend == "native":
        raise ValueError("the native library is missing; use backend: auto")
    return _descend_reference(block, rounds, pairs)


class _Block(NamedTuple):
    """See `descend`."""

    gram: Tensor
    levels: Tensor
    group_of: Tensor
    indices: Tensor
    gradient: Tensor


def _check(block: _Block) -> None:
    gram, levels, group_of, indices, gradient = block
    rows, columns = indices.shape
    whole = all(t.is_contiguous() for t in (indices, gradient)) and indices.dtype == torch.uint8
    fitting = gram.shape == (columns, columns) and gradient.shape == indices.shape and group_of.shape == (columns,)
    doubles = gram.dtype == gradient.dtype == torch.float64
    if not (whole and fitting and doubles and levels.shape[0] == rows and 1 <= levels.shape[2] <= MOST_LEVELS):
        raise ValueError("the tensors of a descent do not fit together")


def _descend_reference(block: _Block, rounds: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """`descend` in PyTorch: the definition, and the form for other devices than the CPU."""
    state = _State(block._replace(levels=block.levels.double(), group_of=block.group_of.long()))
    for _ in range(rounds):
        before = int(state.changes.sum())
        state.singles()
        if pairs:
            state.pairs()
        if int(state.changes.sum()) == before:
            break
    return state.decrease, state.changes


class _State:
    """Rows go together; a row that does not move adds a zero. Nothing is asked of the device on the way."""

    def __init__(self, block: _Block) -> None:
        gram, levels, group_of, indices, gradient = block
        self.gram, self.indices, self.gradient = gram, indices, gradient
        self.levels = levels[:, group_of]  # [out, columns, L]
        self.middles = (self.levels[..., 1:] + self.levels[..., :-1]) / 2
        self.last = levels.shape[2] - 1
        self.decrease = torch.zeros(len(indices), dtype=torch.float64, device=indices.device)
        self.changes = torch.zeros(len(indices), dtype=torch.int64, device=indices.device)
        self.values = self.levels.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
        self.curvatures: list[float] = gram.diagonal().tolist()

    def singles(self) -> None:
        for j, own in enumerate(self.curvatures):
            if not own > 0:
                continue
            target = self.values[:, j] + self.gradient[:, j] / own
            index = (target.unsqueeze(1) > self.middles[:, j]).sum(1)
            value = self.levels[:, j].gather(1, index.unsqueeze(1)).squeeze(1)
            step = value - self.values[:, j]
            gain = step * (2 * self.gradient[:, j] - step * own)
            moved = (index != self.indices[:, j]) & (gain > 0)
            self.indices[:, j] = torch.where(moved, index.to(torch.uint8), self.indices[:, j])
            self.values[:, j] = torch.where(moved, value, self.values[:, j])
            self.gradient -= torch.where(moved, step, 0.0).unsqueeze(1) * self.gram[j]
            self.decrease += torch.where(moved, gain, 0.0)
            self.changes += moved

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Distances to the next level above and below, 0 at the ends: [out, columns]."""
        index = self.indices.long().unsqueeze(-1)
        above = self.levels.gather(-1, (index + 1).clamp_max(self.last)).squeeze(-1)
        below = self.levels.gather(-1, (index - 1).clamp_min(0)).squeeze(-1)
        return above - self.values, below - self.values

    def pairs(self) -> None:
        curvature = self.gram.diagonal()
        for i, own in enumerate(self.curvatures):
            if not own > 0:
                continue
            up, down = self._steps()
            upwards = up[:, i] * (up[:, i] * own - 2 * self.gradient[:, i])
            downwards = down[:, i] * (down[:, i] * own - 2 * self.gradient[:, i])
            falls = (up[:, i] == 0) | ((down[:, i] != 0) & (downwards < upwards))
            step = torch.where(falls, down[:, i], up[:, i])
            up[:, i] = down[:, i] = 0  # not its own answer
            moved = self.gradient - step.unsqueeze(1) * self.gram[i]
            rise = up * (up * curvature - 2 * moved)
            fall = down * (down * curvature - 2 * moved)
            best = torch.minimum(rise, fall).amin(1, keepdim=True)
            change = torch.where(falls, downwards, upwards) + best.squeeze(1)
            least = -LEAST_GAIN * (step * step * own)
            taken = (step != 0) & (best.squeeze(1) < 0) & (change < least)
            other = ((rise == best) | (fall == best)).to(torch.uint8).argmax(1, keepdim=True)  # the first
            rises = rise.gather(1, other) == best
            answer = torch.where(rises, up.gather(1, other), down.gather(1, other))
            first = torch.full_like(other, i)
            self._shift(taken, first, torch.where(falls, -1, 1).unsqueeze(1), step)
            self._shift(taken, other, torch.where(rises, 1, -1), answer.squeeze(1))
            self.decrease -= torch.where(taken, change, 0.0)
            self.changes += taken

    def _shift(self, taken: Tensor, column: Tensor, by: Tensor, step: Tensor) -> None:
        """In rows that are `taken`, `by` levels [out, 1] in a column [out, 1], `step` [out] in value."""
        rows = taken.unsqueeze(1)
        index = self.indices.gather(1, column).long() + torch.where(rows, by, 0)
        self.indices.scatter_(1, column, index.to(torch.uint8))
        levels = self.levels.gather(1, column.unsqueeze(-1).expand(-1, -1, self.levels.shape[2])).squeeze(1)
        value = levels.gather(1, index)
        self.values.scatter_(1, column, torch.where(rows, value, self.values.gather(1, column)))
        self.gradient -= torch.where(taken, step, 0.0).unsqueeze(1) * self.gram[column.squeeze(1)]


class _Job(ctypes.Structure):
    """fw_descent_job of native/trit_descent.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("gram", "levels", "group_of", "indices", "gradient")],
        *[(name, ctypes.c_void_p) for name in ("decrease", "changes")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "groups", "level_count")],
        *[(name, ctypes.c_int32) for name in ("rounds", "pairs")],
    ]


def _native() -> Callable[[int, int], int] | None:
    return library.job_function("fw_descent")


def _descend_native(
    native: Callable[[int, int], int], block: _Block, rounds: int, pairs: bool, threads: int | None
) -> tuple[Tensor, Tensor]:
    gram, levels, group_of, indices, gradient = block
    rows, columns = indices.shape
    gram, levels = gram.contiguous(), levels.to(torch.float32).contiguous()
    group_of = group_of.to(torch.int32).contiguous()
    decrease, changes = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    count = library.thread_count(threads)
    # Rows do not depend on each other. Python sees Ctrl-C between calls, and all rows of a large layer take minutes.
    step = max(1, TOGETHER // max(1, columns * columns * rounds)) * ROWS_OF_A_THREAD * count
    for first in range(0, rows, step):
        some = slice(first, min(rows, first + step))
        pointers = (gram, levels[some], group_of, indices[some], gradient[some], decrease[some], changes[some])
        shape = (some.stop - first, columns, *levels.shape[1:])
        job = _Job(*[t.data_ptr() for t in pointers], *shape, rounds, int(pairs))
        library.run_job(native, job, count)
    return decrease, changes
