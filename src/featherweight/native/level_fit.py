"""The scale with which a fixed set of levels misses a group of weights least, by rounding and least squares in turn.

For levels b_1 < ... < b_L and a scale s, a weight takes the nearest of s b_k (of two as near the lower), and s
becomes the least-squares scale sum c w b / sum c b^2 of these; the same again, until s stays or the rounds are over.
Sums are float32 in sixteen parts, so that the native library (native/cpp/level_fit.h) gives the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.choice import Backend, may_be_native
from featherweight.native.clip_search import LANES, summed


def fit_levels(
    values: Tensor,
    counted: Tensor,
    levels: Tensor,
    scales: Tensor,
    rounds: int,
    *,
    threads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Scales float32 [rows, groups], and what they miss, sum c (w - s b)^2, float32 [rows, groups].

    values : float32 [rows, groups, size]
    counted : float32 [groups, size], weights >= 0
    levels : float32 [L], ascending, at least two and at most 256
    scales : float32 [rows, groups], where to begin
    """
    if values.dim() != 3 or counted.shape != values.shape[1:] or scales.shape != values.shape[:2]:
        raise ValueError(
            f"values {list(values.shape)}, counted {list(counted.shape)} and scales {list(scales.shape)} do not fit"
        )
    if levels.dim() != 1 or not 2 <= len(levels) <= 256 or bool((levels.diff() <= 0).any()):
        raise ValueError("levels are from 2 to 256 ascending numbers")
    native = _native() if may_be_native(backend, values) else None
    if native is not None and values.numel():
        return _native_fit(native, (values, counted, levels, scales), rounds, threads)
    if backend == "native":
        raise ValueError("the native library is missing; use backend: auto")
    return fit_levels_reference(values, counted, levels, scales, rounds)


def fit_levels_reference(
    values: Tensor, counted: Tensor, levels: Tensor, scales: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """The definition; see `fit_levels`."""
    short = -values.shape[-1] % LANES
    values, counted = (torch.nn.functional.pad(one, (0, short)) for one in (values, counted))
    for _ in range(rounds):
        digits = _nearest(values, levels, scales)
        weighted = digits * counted
        square = summed(weighted * digits)
        scales = torch.where(square > 0, summed(weighted * values) / square, scales)
    missed = values - scales.unsqueeze(-1) * _nearest(values, levels, scales)
    return scales, summed(missed * missed * counted)


def _nearest(values: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """The level [rows, groups, size] of each value, in units of the scales."""
    ordered = torch.where((scales < 0).unsqueeze(-1), levels.flip(0), levels)  # [rows, groups, L]
    points = scales.unsqueeze(-1) * ordered
    middles = ((points[..., 1:] + points[..., :-1]) / 2).contiguous()
    return ordered.gather(-1, torch.searchsorted(middles, values.contiguous()))


class _Job(ctypes.Structure):
    """fw_level_fit_job of native/cpp/level_fit.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("values", "counted", "levels", "scales", "errors")],
        *[(name, ctypes.c_int64) for name in ("groups", "size", "period", "level_count")],
        ("rounds", ctypes.c_int32),
    ]


def _native() -> Callable[[int, int], int] | None:
    return library.job_function("fw_level_fit")


def _native_fit(
    native: Callable[[int, int], int],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    rounds: int,
    threads: int | None,
) -> tuple[Tensor, Tensor]:
    """tensors : values, counted, levels and scales of `fit_levels`"""
    values, counted, levels = (one.float().contiguous() for one in tensors[:3])
    rows, groups, size = values.shape
    scales = tensors[3].to(torch.float32, copy=True).contiguous()
    errors = torch.empty_like(scales)
    pointers = (one.data_ptr() for one in (values, counted, levels, scales, errors))
    job = _Job(*pointers, rows * groups, size, groups, len(levels), rounds)
    library.run_job(native, job, threads)
    return scales, errors
