"""The columns of one block of a Hessian sweep: round a column, feed its error to the columns after it.

The definition in PyTorch, which is also the form for other devices than the CPU, and the native library's form of it
(native/sweep.h), which gives the same bits in float32.
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
from featherweight.native.choice import Backend, may_be_native

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
    totals: Tensor  # float64 [3]: loss, clipped and drift, left where the weight is

    @property
    def loss(self) -> float:
        """Sum of ((w - q) / U_jj)^2."""
        return float(self.totals[0])

    @property
    def clipped(self) -> int:
        """Weights more than half a step outside the range of their group."""
        return int(self.totals[1])

    @property
    def drift(self) -> float:
        """Largest |w - w0|."""
        return float(self.totals[2])


@dataclass(frozen=True)
class Columns:
    """The columns of a call, and what they are rounded by.

    weight, original : [out, columns], rows contiguous; float32, or float64 (reference only)
    upper, feedback : [columns, columns] blocks of U and P, only their upper triangles are read
    levels : float32 [out, groups, L], ascending
    group_of : int32 [columns]
    """

    weight: Tensor
    original: Tensor
    upper: Tensor
    feedback: Tensor | None
    levels: Tensor
    group_of: Tensor
    rule: FeedbackRule


def sweep_columns(columns: Columns, threads: int | None = None, backend: Backend = "auto") -> SweptColumns:
    """Round all columns in order. Changes `columns.weight` in place: each ends as it was before rounding."""
    native = _native() if may_be_native(backend, columns.weight) else None
    if native is not None and _can(columns):
        return _sweep_native(native, columns, threads)
    if backend == "native":
        raise ValueError("the native library is missing or cannot treat this sweep; use backend: auto")
    return sweep_columns_reference(columns)


def sweep_columns_reference(columns: Columns) -> SweptColumns:
    """The definition, and the form for other devices than the CPU; see `sweep_columns`.

    Rows go together. Nothing is asked of the device on the way, so that it always has the next columns' work waiting.
    """
    weight, original, upper, feedback = columns.weight, columns.original, columns.upper, columns.feedback
    rule, rows = columns.rule, len(weight)
    indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(weight, memory_format=torch.contiguous_format)
    residuals = None if feedback is None else torch.empty_like(errors)
    apart = rule.tail != "pre"
    tail_errors = torch.empty_like(errors) if apart else errors
    tail_residuals = torch.empty_like(errors) if apart and residuals is not None else residuals
    totals = _Totals(weight)
    place, grid = -1, _Levels(columns.levels[:, :0])
    for j, group in enumerate(columns.group_of.tolist()):
        if group != place:
            place, grid = group, _Levels(columns.levels[:, group].to(weight.dtype))
        w, w0 = weight[:, j], original[:, j]
        if rule.pull_back == "next-column":
            w -= rule.shrink * (w - w0)
        index, q, outside = grid.nearest(w)
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
            instead = q if rule.tail == "rounded" else grid.clamped(w)
            tail_errors[:, j] = passed_on(instead)
            if tail_residuals is not None:
                tail_residuals[:, j] = residual(instead)
        totals.add((w - q) / pivot, outside, w - w0)
        after = weight[:, j + 1 :]
        pulled = rule.shrink * (after - original[:, j + 1 :]) if rule.pull_back == "all-columns" else None
        after -= errors[:, j : j + 1] * upper[j, j + 1 :]
        if residuals is not None and feedback is not None:
            after += residuals[:, j : j + 1] * feedback[j, j + 1 :]
        if pulled is not None:
            after -= pulled
    return SweptColumns(indices, errors, residuals, tail_errors, tail_residuals, totals.together())


class _Levels:
    """The levels of a group, [out, L] ascending, in the weight's dtype, and what is derived of them once."""

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels
        self.middles = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = levels[:, :1], levels[:, -1:]
        several = levels.shape[1] > 1
        steps = (levels[:, 1:2] - ends[0], ends[1] - levels[:, -2:-1]) if several else (0 * ends[0], 0 * ends[1])
        self.low, self.high = (ends[0] - steps[0] / 2).squeeze(1), (ends[1] + steps[1] / 2).squeeze(1)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index and value of the nearest level (the lower one in a tie) and whether the weight is beyond the range."""
        index = (weight.unsqueeze(1) > self.middles).sum(1)
        value = self.levels.gather(1, index.unsqueeze(1)).squeeze(1)
        return index.to(torch.uint8), value, (weight < self.low) | (weight > self.high)

    def clamped(self, weight: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(weight, self.levels[:, 0]), self.levels[:, -1])


class _Totals:
    """What is counted on the way, by row."""

    def __init__(self, weight: Tensor) -> None:
        self.loss = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self.clipped = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self.drift = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)

    def add(self, missed: Tensor, outside: Tensor, moved: Tensor) -> None:
        self.loss += missed.double() ** 2
        self.clipped += outside
        self.drift = torch.maximum(self.drift, moved.abs())

    def together(self) -> Tensor:
        return totals_of(self.loss, self.clipped, self.drift)


def totals_of(loss: Tensor, clipped: Tensor, drift: Tensor) -> Tensor:
    """`SweptColumns.totals` of numbers by row."""
    largest = drift.amax() if len(drift) else drift.sum()
    return torch.stack([loss.sum(), clipped.sum().double(), largest.double()])


def _can(columns: Columns) -> bool:
    matrices = (columns.weight, columns.original, columns.upper, columns.feedback)
    whole = all(t is None or t.dtype == torch.float32 and t.stride(1) == 1 for t in matrices)
    return whole and columns.levels.shape[2] <= MOST_LEVELS and columns.rule.pull_back != "all-columns"


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


def _sweep_native(native: Callable[[int, int], int], columns: Columns, threads: int | None) -> SweptColumns:
    weight, original, upper, feedback = columns.weight, columns.original, columns.upper, columns.feedback
    rule, rows = columns.rule, len(weight)
    levels = columns.levels.to(torch.float32).contiguous()
    group_of = columns.group_of.to(torch.int32).contiguous()
    indices = torch.empty(weight.shape, dtype=torch.uint8)
    errors = torch.empty(weight.shape, dtype=torch.float32)
    residuals = None if feedback is None else torch.empty(weight.shape, dtype=torch.float32)
    apart = rule.tail != "pre"
    tail_errors = torch.empty_like(errors) if apart else errors
    tail_residuals = torch.empty_like(errors) if apart and residuals is not None else residuals
    loss, clipped = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    drift = torch.zeros(rows, dtype=torch.float32)

    def address(tensor: Tensor | None, wanted: bool = True) -> int | None:
        return None if tensor is None or not wanted else tensor.data_ptr()

    job = _Job(
        weight.data_ptr(), original.data_ptr(), upper.data_ptr(), address(feedback), levels.data_ptr(),
        group_of.data_ptr(), indices.data_ptr(), errors.data_ptr(), address(residuals), address(tail_errors, apart),
        address(tail_residuals, apart), loss.data_ptr(), clipped.data_ptr(), drift.data_ptr(),
        *weight.shape, levels.shape[1], levels.shape[2],
        weight.stride(0), original.stride(0), upper.stride(0), 0 if feedback is None else feedback.stride(0),
        rule.alpha, rule.residual, rule.shrink,
        int(rule.pull_back == "next-column"), ("pre", "rounded", "clamped").index(rule.tail),
    )  # fmt: skip
    library.run_job(native, job, threads)
    return SweptColumns(indices, errors, residuals, tail_errors, tail_residuals, totals_of(loss, clipped, drift))
