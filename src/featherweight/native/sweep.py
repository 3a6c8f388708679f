"""The columns of one block of a Hessian sweep: round a column, feed its error to the columns after it.

The definition in PyTorch, and the native library's form of it (native/sweep.h), which gives the same bits in float32.
What a column passes on, with w its value just before rounding, w0 the original, q the rounded one, U the upper factor
of the inverse second moment and P the feedback of a cross moment (see `featherweight.methods.quantize.sweep`):

    e = ((w - q) + residual (w0 - w) + shrink (w0 - w)) / U_jj       W[:, k] -= e U_jk
    r = alpha w + residual (w0 - w)                                  W[:, k] += r P_jk
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.native import library

MOST_LEVELS = 256


@dataclass(frozen=True)
class FeedbackRule:
    """What a column hands on (see the module). Columns behind the block get it with w replaced according to `tail`."""

    alpha: float = 0.0
    residual: float = 0.0
    shrink: float = 0.0
    pull_back: Literal["none", "next-column", "all-columns"] = "none"
    tail: Literal["pre", "rounded", "clamped"] = "pre"


@dataclass(frozen=True)
class SweptColumns:
    """Outcome for the columns of a call. `tail_` forms are the same tensors unless the rule's tail asks for others."""

    indices: Tensor  # uint8 [out, columns]: the chosen levels
    errors: Tensor  # e [out, columns]
    residuals: Tensor | None  # r [out, columns], with feedback
    tail_errors: Tensor
    tail_residuals: Tensor | None
    loss: float  # sum of ((w - q) / U_jj)^2
    clipped: int  # weights more than half a step outside the range of their group
    drift: float  # largest |w - w0|


def sweep_columns(
    weight: Tensor,
    original: Tensor,
    upper: Tensor,
    feedback: Tensor | None,
    levels: Tensor,
    group_of: Tensor,
    rule: FeedbackRule,
    threads: int | None = None,
    backend: Literal["auto", "native", "reference"] = "auto",
) -> SweptColumns:
    """Round all columns of `weight` in order. Changes `weight` in place: each column ends as it was before rounding.

    weight, original : [out, columns], rows contiguous; float32, or float64 (reference only)
    upper, feedback : [columns, columns] blocks of U and P, only their upper triangles are read
    levels : float32 [out, groups, L], ascending; group_of : int32 [columns]
    """
    native = None if backend == "reference" else _native()
    if native is not None and _can(weight, original, upper, feedback, levels, rule):
        return _sweep_native(native, weight, original, upper, feedback, levels, group_of, rule, threads)
    if backend == "native":
        raise ValueError("the native library is missing or cannot treat this sweep; use backend: auto")
    return sweep_columns_reference(weight, original, upper, feedback, levels, group_of, rule)


def sweep_columns_reference(
    weight: Tensor,
    original: Tensor,
    upper: Tensor,
    feedback: Tensor | None,
    levels: Tensor,
    group_of: Tensor,
    rule: FeedbackRule,
) -> SweptColumns:
    """The definition; see `sweep_columns`."""
    rows, columns = weight.shape
    indices = torch.empty(rows, columns, dtype=torch.uint8)
    errors = torch.empty_like(weight, memory_format=torch.contiguous_format)
    residuals = None if feedback is None else torch.empty_like(errors)
    apart = rule.tail != "pre"
    tail_errors = torch.empty_like(errors) if apart else errors
    tail_residuals = torch.empty_like(errors) if apart and residuals is not None else residuals
    loss = torch.zeros(rows, dtype=torch.float64)
    clipped, drift = 0, 0.0
    for j in range(columns):
        w, w0 = weight[:, j], original[:, j]
        if rule.pull_back == "next-column":
            w -= rule.shrink * (w - w0)
        grid = levels[:, int(group_of[j])].to(weight.dtype)
        index, q, outside = _nearest(w, grid)
        pivot = upper[j, j].expand(rows)

        def passed_on(instead: Tensor, w: Tensor = w, w0: Tensor = w0, q: Tensor = q, pivot: Tensor = pivot) -> Tensor:
            kept, shrunk = rule.residual * (w0 - instead), rule.shrink * (w0 - w)
            return (((w - q) + kept) + shrunk) / pivot

        def residual(instead: Tensor, w0: Tensor = w0) -> Tensor:
            return rule.alpha * instead + rule.residual * (w0 - instead)

        indices[:, j] = index
        errors[:, j] = passed_on(w)
        if residuals is not None:
            residuals[:, j] = residual(w)
        if apart:
            instead = q if rule.tail == "rounded" else torch.minimum(torch.maximum(w, grid[:, 0]), grid[:, -1])
            tail_errors[:, j] = passed_on(instead)
            if tail_residuals is not None:
                tail_residuals[:, j] = residual(instead)
        loss += ((w - q) / pivot).double() ** 2
        clipped += int(outside.sum())
        drift = max(drift, float((w - w0).abs().max()))
        after = weight[:, j + 1 :]
        pulled = rule.shrink * (after - original[:, j + 1 :]) if rule.pull_back == "all-columns" else None
        after -= errors[:, j : j + 1] * upper[j, j + 1 :]
        if residuals is not None and feedback is not None:
            after += residuals[:, j : j + 1] * feedback[j, j + 1 :]
        if pulled is not None:
            after -= pulled
    return SweptColumns(indices, errors, residuals, tail_errors, tail_residuals, float(loss.sum()), clipped, drift)


def _nearest(weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index and value of the nearest level (the lower one in a tie) and whether the weight is beyond the range."""
    middles = (grid[:, 1:] + grid[:, :-1]) / 2
    index = (weight.unsqueeze(1) > middles).sum(1)
    ends = grid[:, :1], grid[:, -1:]
    steps = (grid[:, 1:2] - ends[0], ends[1] - grid[:, -2:-1]) if grid.shape[1] > 1 else (0 * ends[0], 0 * ends[1])
    low, high = (ends[0] - steps[0] / 2).squeeze(1), (ends[1] + steps[1] / 2).squeeze(1)
    value = grid.gather(1, index.unsqueeze(1)).squeeze(1)
    return index.to(torch.uint8), value, (weight < low) | (weight > high)


def _can(
    weight: Tensor, original: Tensor, upper: Tensor, feedback: Tensor | None, levels: Tensor, rule: FeedbackRule
) -> bool:
    whole = all(t is None or t.dtype == torch.float32 and t.stride(1) == 1 for t in (weight, original, upper, feedback))
    return whole and levels.shape[2] <= MOST_LEVELS and rule.pull_back != "all-columns"


class _Job(ctypes.Structure):
    """fw_sweep_job of native/sweep.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "original", "upper", "feedback", "levels", "group_of")],
        *[(name, ctypes.c_void_p) for name in ("indices", "errors", "residuals", "tail_errors", "tail_residuals")],
        *[(name, ctypes.c_void_p) for name in ("loss", "clipped", "drift")],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "groups", "level_count")],
        *[(name, ctypes.c_int64) for name in ("weight_stride", "original_stride", "upper_stride", "feedback_stride")],
        *[(name, ctypes.c_float) for name in ("alpha", "residual", "shrink")],
        *[(name, ctypes.c_int32) for name in ("pull_back", "tail")],
    ]


def _native() -> Callable[[int, int], int] | None:
    return library.job_function("fw_sweep")


def _sweep_native(
    native: Callable[[int, int], int],
    weight: Tensor,
    original: Tensor,
    upper: Tensor,
    feedback: Tensor | None,
    levels: Tensor,
    group_of: Tensor,
    rule: FeedbackRule,
    threads: int | None,
) -> SweptColumns:
    rows, columns = weight.shape
    levels, group_of = levels.to(torch.float32).contiguous(), group_of.to(torch.int32).contiguous()
    indices = torch.empty(rows, columns, dtype=torch.uint8)
    errors = torch.empty(rows, columns)
    residuals = None if feedback is None else torch.empty(rows, columns)
    apart = rule.tail != "pre"
    tail_errors = torch.empty_like(errors) if apart else errors
    tail_residuals = torch.empty_like(errors) if apart and residuals is not None else residuals
    loss, clipped = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    drift = torch.zeros(rows)

    def address(tensor: Tensor | None, wanted: bool = True) -> int | None:
        return None if tensor is None or not wanted else tensor.data_ptr()

    job = _Job(
        weight.data_ptr(), original.data_ptr(), upper.data_ptr(), address(feedback), levels.data_ptr(),
        group_of.data_ptr(), indices.data_ptr(), errors.data_ptr(), address(residuals), address(tail_errors, apart),
        address(tail_residuals, apart), loss.data_ptr(), clipped.data_ptr(), drift.data_ptr(),
        rows, columns, levels.shape[1], levels.shape[2],
        weight.stride(0), original.stride(0), upper.stride(0), 0 if feedback is None else feedback.stride(0),
        rule.alpha, rule.residual, rule.shrink,
        int(rule.pull_back == "next-column"), ("pre", "rounded", "clamped").index(rule.tail),
    )  # fmt: skip
    library.run_job(native, job, threads)
    totals = float(loss.sum()), int(clipped.sum()), float(drift.max()) if rows else 0.0
    return SweptColumns(indices, errors, residuals, tail_errors, tail_residuals, *totals)
