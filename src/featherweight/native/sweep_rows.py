"""A Hessian sweep in which rows hand their errors to later rows, too: the columns of one block, for some rows.

The definition in PyTorch, and the native library's form of it (native/sweep_rows.h), which gives the same bits in
float32. Rows go in order; V is the upper factor of the inverse second moment between rows, as U is between columns
(`featherweight.native.sweep`). With w a weight just before rounding, q the rounded one and t its target, which is the
original weight less what rows before it handed on:

    e = (w - q) / U_jj        W[i, k] -= e U_jk
    r = (t - q) / V_ii        W[k, j] -= r V_ik       T[k, j] -= r V_ik
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.choice import Backend, may_be_native
from featherweight.native.sweep import MOST_LEVELS, Columns, FeedbackRule, SweptColumns, sweep_columns, totals_of


def sweep_rows(
    columns: Columns, between: Tensor, threads: int | None = None, backend: Backend = "auto"
) -> tuple[SweptColumns, Tensor]:
    """Round all columns row by row. Returns their outcome and r [out, columns], for rows that follow.

    columns : with a plain rule and no feedback of a cross moment. Both `weight`, which ends as it was before rounding,
        and `original`, which is the target t, are changed in place.
    between : V [out, out], float32, or float64 (reference only); its upper triangle is read

    The totals' loss is that of `sweep_columns` with each row divided by V_ii^2, their drift the largest |w - t|.
    """
    if columns.rule != FeedbackRule() or columns.feedback is not None:
        raise ValueError("a sweep with feedback between rows has no rule of its own and no cross moment")
    native = library.job_function("fw_sweep_rows") if may_be_native(backend, columns.weight, between) else None
    if native is not None and _can(columns, between):
        job, kept = _job(columns, between)
        library.run_job(native, job, threads)
        loss = kept.loss / between.diagonal().double().square()
        totals = totals_of(loss, kept.clipped, kept.drift)
        return SweptColumns(kept.indices, kept.errors, None, kept.errors, None, totals), kept.row_errors
    if backend == "native":
        raise ValueError("the native library is missing or cannot treat this sweep; use backend: auto")
    return sweep_rows_reference(columns, between)


def sweep_rows_reference(columns: Columns, between: Tensor) -> tuple[SweptColumns, Tensor]:
    """The definition; see `sweep_rows`."""
    weight, target = columns.weight, columns.original
    passed = torch.empty_like(weight, memory_format=torch.contiguous_format)
    swept: list[SweptColumns] = []
    for i in range(len(weight)):
        row, levels = slice(i, i + 1), columns.levels[i : i + 1]
        one = Columns(weight[row], target[row], columns.upper, None, levels, columns.group_of, columns.rule)
        swept.append(sweep_columns(one, 1, "reference"))
        passed[row] = (target[row] - taken(levels, columns.group_of, swept[-1].indices)) / between[i, i]
        for later in (weight, target):
            later[i + 1 :] -= passed[row] * between[i, i + 1 :].unsqueeze(1)
    indices, errors = (torch.cat([getattr(one, name) for one in swept]) for name in ("indices", "errors"))
    loss, clipped, drift = torch.stack([one.totals for one in swept]).unbind(1)
    totals = totals_of(loss / between.diagonal().double().square(), clipped, drift)
    return SweptColumns(indices, errors, None, errors, None, totals), passed


def taken(levels: Tensor, group_of: Tensor, indices: Tensor) -> Tensor:
    """The levels that were chosen, float32 [out, columns]. levels [out, groups, L], group_of [columns]"""
    places = group_of.long() * levels.shape[2] + indices.long()
    return levels.reshape(len(levels), -1).gather(1, places)


def _can(columns: Columns, between: Tensor) -> bool:
    matrices = (columns.weight, columns.original, columns.upper, between)
    return (
        all(t.dtype == torch.float32 and t.stride(1) == 1 for t in matrices) and columns.levels.shape[2] <= MOST_LEVELS
    )


class _Job(ctypes.Structure):
    """fw_sweep_rows_job of native/sweep_rows.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "target", "upper", "between", "levels", "group_of")],
        *[(name, ctypes.c_void_p) for name in ("indices", "errors", "row_errors", "loss", "clipped", "drift")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "groups", "level_count")],
        *[(name, ctypes.c_int64) for name in ("weight_stride", "target_stride", "upper_stride", "between_stride")],
    ]


class _Kept:
    """What a job writes, and what it reads of tensors that nobody else keeps."""

    def __init__(self, columns: Columns) -> None:
        shape, rows = columns.weight.shape, len(columns.weight)
        self.levels = columns.levels.to(torch.float32).contiguous()
        self.group_of = columns.group_of.to(torch.int32).contiguous()
        self.indices = torch.empty(shape, dtype=torch.uint8, device="cpu")
        self.errors, self.row_errors = (
            torch.empty(shape, dtype=torch.float32, device="cpu"),
            torch.empty(shape, dtype=torch.float32, device="cpu"),
        )
        self.loss = torch.zeros(rows, dtype=torch.float64, device="cpu")
        self.clipped = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.drift = torch.zeros(rows, dtype=torch.float32, device="cpu")


def _job(columns: Columns, between: Tensor) -> tuple[_Job, _Kept]:
    kept, read = _Kept(columns), (columns.weight, columns.original, columns.upper, between)
    written = (kept.indices, kept.errors, kept.row_errors, kept.loss, kept.clipped, kept.drift)
    pointers = (*read, kept.levels, kept.group_of, *written)
    sizes = (*columns.weight.shape, *kept.levels.shape[1:])
    return _Job(*(t.data_ptr() for t in pointers), *sizes, *(t.stride(0) for t in read)), kept
