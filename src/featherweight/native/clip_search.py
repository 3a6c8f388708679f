"""Which of several uniform grids misses a group least: the search for a clip.

A group v is measured in units of its largest absolute value. A trial with scale s, in these units t, and zero point z
misses it by e = v - t round(clamp(v / t, -z, 2^b - 1 - z)), in all by sum_i counted_i |e_i|^exponent.

The first trial of least error is chosen; the trial 0 where no error is a number. Sums are float32 in sixteen parts. A
power other than the square is a polynomial of base-2 logarithm and exponential (off by 1e-6 at most for exponents from
1.5 to 2.5), so that the native library (native/clip_search.h) makes the same choice as the definition in PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.choice import Backend, may_be_native

LANES = 16  # partial sums
ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
LOG2 = (0.170656979, -0.272686452, 0.297250807, -0.358963221, 0.480466217, -0.721375823, 1.44269967)
EXP2 = (0.00132764666, 0.00967554189, 0.0555071346, 0.240221202, 0.693146944, 1.00000012)


def least_error(
    groups: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    highest: int,
    exponent: float = 2.0,
    counted: Tensor | None = None,
    *,
    threads: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The chosen trial of each group, int64 [rows, groups].

    groups : float32 [rows, groups, size]
    scales, zero_points : [trials, rows, groups]; scales not negative, zero points whole, from 0 to `highest`
    highest : the last code of the grids, 2^bits - 1
    exponent : of the error, above 0, at most 8
    counted : weights of the errors of a row, float32 [1, groups, size]; None: all alike
    """
    scales, zero_points = scales.float().contiguous(), zero_points.float().contiguous()
    native = _native() if may_be_native(backend, groups) else None
    if native is not None:
        return _least_error_native(native, groups, (scales, zero_points, highest), (exponent, counted), threads)
    if backend == "native":
        raise ValueError("the native library is missing; use backend: auto")
    return least_error_reference(groups, scales, zero_points, highest, exponent, counted)


def least_error_reference(
    groups: Tensor, scales: Tensor, zero_points: Tensor, highest: int, exponent: float, counted: Tensor | None
) -> Tensor:
    """The definition; see `least_error`."""
    short = -groups.shape[-1] % LANES
    unit = groups.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    values = torch.nn.functional.pad(groups / unit.unsqueeze(-1), (0, short))
    if counted is not None:
        counted = torch.nn.functional.pad(counted, (0, short))
    chosen = torch.zeros(unit.shape, dtype=torch.int64, device=unit.device)
    least = torch.full_like(unit, torch.nan)
    for trial, (scale, zero_point) in enumerate(zip(scales, zero_points, strict=True)):
        inverse = torch.where(scale > 0, unit / scale, torch.zeros_like(scale)).unsqueeze(-1)
        low, high = -zero_point.unsqueeze(-1), (highest - zero_point).unsqueeze(-1)
        steps = torch.minimum(torch.maximum(values * inverse, low), high).round_()
        error = (values - steps * (scale / unit).unsqueeze(-1)).square_()
        if exponent != 2:
            error = raised(error, exponent / 2 - 1)
        found = summed(error if counted is None else error * counted)
        better = (found < least) if trial else torch.ones_like(chosen, dtype=torch.bool)
        least = torch.where(better, found, least)
        chosen = torch.where(better, trial, chosen)
    return chosen


def raised(x: Tensor, extra: float) -> Tensor:
    """x^(1 + extra) for float32 x >= 0: x times 2^(extra log2 x), the logarithm and the power as polynomials."""
    bits = x.view(torch.int32)
    exponent = (bits - ROOT_HALF) >> 23
    m = (bits - (exponent << 23)).view(torch.float32) - 1
    power = _polynomial((*LOG2, exponent.float()), m) * torch.tensor(extra, dtype=torch.float32)
    clamped = power.clamp(min=-126)
    whole = clamped.round()
    two = _polynomial(EXP2, clamped - whole)
    return x * (two.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)


def _polynomial(coefficients: tuple[float | Tensor, ...], x: Tensor) -> Tensor:
    value = x * torch.tensor(coefficients[0], dtype=torch.float32)
    for coefficient in coefficients[1:-1]:
        value = (value + torch.tensor(coefficient, dtype=torch.float32)).mul_(x)
    return value + coefficients[-1]


def summed(errors: Tensor) -> Tensor:
    """Sums over the last axis, a multiple of LANES: part by part, then the parts by halves."""
    sums = torch.zeros(*errors.shape[:-1], LANES, dtype=torch.float32, device=errors.device)
    for part in torch.split(errors, LANES, dim=-1):
        sums += part
    while sums.shape[-1] > 1:
        first, second = sums.chunk(2, dim=-1)
        sums = first + second
    return sums.squeeze(-1)


class _Job(ctypes.Structure):
    """fw_clip_job of native/clip_search.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("values", "counted", "scales", "zero_points", "chosen")],
        *[(name, ctypes.c_int64) for name in ("groups", "size", "period", "trials")],
        *[(name, ctypes.c_float) for name in ("highest", "exponent")],
    ]


def _native() -> Callable[[int, int], int] | None:
    return library.job_function("fw_clip_search")


def _least_error_native(
    native: Callable[[int, int], int],
    groups: Tensor,
    trials: tuple[Tensor, Tensor, int],
    error: tuple[float, Tensor | None],
    threads: int | None,
) -> Tensor:
    """trials : scales, zero points, highest code; error : its exponent, and weights; see `least_error`"""
    (scales, zero_points, highest), (exponent, counted) = trials, error
    rows, per_row, size = groups.shape
    groups = groups.float().contiguous()
    counted = None if counted is None else counted.float().contiguous()
    chosen = torch.empty(rows, per_row, dtype=torch.int32)
    job = _Job(
        groups.data_ptr(), None if counted is None else counted.data_ptr(), scales.data_ptr(), zero_points.data_ptr(),
        chosen.data_ptr(), rows * per_row, size, max(per_row, 1), len(scales), highest, exponent,
    )  # fmt: skip
    library.run_job(native, job, threads)
    return chosen.long()
