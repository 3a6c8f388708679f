"""Codes as integers with a scale a group: W = s q, or s q + m, which is what most blocks of ggml hold.

Signed and some rows at a time, with bounds and offsets, where `interop/integers.py` has unsigned codes with zero points
and an order of columns, as the formats of folders have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.native.packing import TRITS_PER_BYTE, unpack_bits, unpack_trits
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import WHOLE_BYTES
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.sherry import Sherry
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

WINDOW_WEIGHTS = 1 << 20
"""Form at a time: with what is made of them they stay in the cache."""


@dataclass(frozen=True)
class Form:
    """A matrix as integers, one way of several in which it may be seen.

    low, high : bounds of the integers
    group_size : columns that share a scale; the last group may be short
    scales : [out, groups], as they are stored where one scale a group is
    offsets : float32 [out, groups], or None
    rows : the integers of rows [first, last): int8 [last - first, in]; `first` is a multiple of 40
    signs : whether no integer is 0
    """

    low: int
    high: int
    group_size: int
    scales: Tensor
    offsets: Tensor | None
    rows: Callable[[int, int], Tensor]
    signs: bool = False


def window_rows(columns: int) -> int:
    """Rows of a window; a multiple of those from which every packing begins at a whole byte."""
    return max(1, WINDOW_WEIGHTS // max(1, columns) // WHOLE_BYTES) * WHOLE_BYTES


def forms_of(code: Code) -> list[Form]:
    """The ways in which a code is integers with a scale a group of columns; none for most kinds. Reads scales and zero
    points alone."""
    if isinstance(code, Uniform):
        return _uniform(code)
    if isinstance(code, TritPlanes):
        return _trit_planes(code)
    if isinstance(code, OffsetTrits):
        low = code.offsets.double() - code.scales.double()
        rows = _cut(lambda: code.unpack() + 1)
        return [Form(0, 2, code.group_size, code.scales, low.float(), rows)]
    if isinstance(code, Sherry):
        return [Form(-1, 1, code.group_size, code.scales, None, _cut(code.unpack))]
    if isinstance(code, BinaryPlanes) and code.planes == 1 and code.rows_per_scale == 1:
        scales = code.scale_values()[:, :, 0]
        return [Form(-1, 1, code.group_size, scales, None, _cut(lambda: code.unpack()[0]), signs=True)]
    return []


def _cut(unpack: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
    """Rows of what is unpacked once, when the first are asked for."""
    whole = functools.cache(unpack)
    return lambda first, last: whole()[first:last]


def _trit_planes(code: TritPlanes) -> list[Form]:
    if code.planes > 1 and not code.tied:
        return []
    weights = code.plane_weights if code.tied else (1,)
    scales = code.scales if code.scales.dim() == 2 else code.scales[:, :, 0]
    columns, per_byte = code.shape[1], TRITS_PER_BYTE[code.packing]

    def rows(first: int, last: int) -> Tensor:
        begin, end = first * columns // per_byte, -(-last * columns // per_byte)
        count = (last - first) * columns
        total = unpack_trits(code.trits[0, begin:end], count, code.packing)
        if weights[0] != 1:
            total = total * weights[0]
        for plane, weight in zip(code.trits[1:], weights[1:], strict=True):
            total.add_(unpack_trits(plane[begin:end], count, code.packing), alpha=weight)
        return total.view(last - first, columns)

    return [Form(-sum(weights), sum(weights), code.group_size, scales, None, rows)]


def _uniform(code: Uniform) -> list[Form]:
    if code.axis != "input":
        return []
    columns, bits, scales = code.shape[1], code.bits, code.scales

    def codes(first: int, last: int) -> Tensor:
        part = code.codes[first * columns * bits // 8 : -(-last * columns * bits // 8)]
        return unpack_bits(part, (last - first) * columns, bits).view(last - first, columns)

    def signed(zeros: Tensor | int) -> Callable[[int, int], Tensor]:
        """Codes less zero points; bytes wrap around, and the result is within [-128, 127] where it is used."""
        spread = torch.arange(columns) // code.group_size

        def rows(first: int, last: int) -> Tensor:
            less = zeros if isinstance(zeros, int) else zeros[first:last].index_select(1, spread)
            return (codes(first, last) - less).view(torch.int8)

        return rows

    most = (1 << bits) - 1
    if code.offsets is not None:  # W = s q + m
        plain = code.offsets.float()
        return [Form(0, most, code.group_size, scales, plain, lambda a, b: codes(a, b).view(torch.int8))]
    half = 1 << (bits - 1)
    if code.zero_points is None:
        return [Form(-half, half - 1, code.group_size, scales, None, signed(half))]
    zeros = unpack_bits(code.zero_points, scales.numel(), bits).view(scales.shape)
    bounds = -int(zeros.max()), most - int(zeros.min())
    low = (-zeros.double() * scales.double()).float()
    forms = [Form(*bounds, code.group_size, scales, None, signed(zeros))]
    return [*forms, Form(0, most, code.group_size, scales, low, lambda a, b: codes(a, b).view(torch.int8))]
