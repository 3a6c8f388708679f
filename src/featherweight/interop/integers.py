"""Which codes are whole numbers with a scale for each group of columns, as the formats of other tools have them.

Uniform codes are by definition. So are tied trit-planes, whose digits make one symmetric integer with the zero point
2^(b-1), and a single plane; and all of them behind a permutation of columns, which such formats call act-order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.native.packing import unpack_bits
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import DTYPES, groups_of, matrix_shape
from featherweight.storage.codes.nested import part_spec
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.trit_planes import LOG8, TritPlanes, tied_weights
from featherweight.storage.codes.uniform import Uniform

NONE = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Grid:
    """What a spec says of a matrix of integers: W = scale (q - zero point), q of `bits` bits.

    shape : (out, in)
    symmetric : the zero point is 2^(bits - 1) everywhere
    group_size : columns with one scale; the whole row where it is not less than that
    scale_dtype : of the scales
    ordered : columns stand in their own order; else they are grouped in another one
    """

    shape: tuple[int, int]
    bits: int
    symmetric: bool
    group_size: int
    scale_dtype: torch.dtype
    ordered: bool = True

    @property
    def groups(self) -> int:
        return groups_of(self.shape[1], self.group_size)

    @property
    def text(self) -> str:
        """ "W4A16 groups of 128"."""
        whole = self.group_size >= self.shape[1]
        return f"W{self.bits}A16 {'rows' if whole else f'groups of {self.group_size}'}"


@dataclass(frozen=True)
class Integers:
    """The integers of a code, in the order in which columns are grouped.

    codes : uint8 [out, in]
    scales : [out, groups]
    zero_points : uint8 [out, groups], None where it is 2^(bits - 1)
    index : int32 [in], the group of each column of the matrix; None where that is column // group_size
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    index: Tensor | None = None


def grid_of(spec: dict[str, Any]) -> Grid | None:
    """The grid of a code with this spec; None where it is not of that kind."""
    shape = matrix_shape(spec)
    if spec["kind"] == "permuted":
        inner = grid_of(part_spec(spec, spec.get("inner"), "inner"))
        if inner is None or not inner.ordered:
            return None
        return replace(inner, ordered=inner.groups == 1)  # within one group the order says nothing
    if spec["kind"] == "uniform" and spec.get("axis", "input") == "input" and not spec.get("offsets"):
        symmetric, size = bool(spec.get("symmetric", False)), min(spec["group_size"], shape[1])
        return Grid(shape, spec["bits"], symmetric, size, _scale_dtype(spec))
    if spec["kind"] == "trit-planes" and (spec["planes"] == 1 or spec.get("tied", False)):
        most = sum(_weights(spec))
        bits = 1 + most.bit_length()
        if bits <= 8:
            return Grid(shape, bits, True, min(spec["group_size"], shape[1]), _scale_dtype(spec))
    return None


def integers_of(code: Code, *, codes: bool = True) -> Integers:
    """The integers of a code whose spec has a grid. ValueError for others.

    codes : whether the codes themselves are wanted; else they are an empty tensor, and little is unpacked
    """
    if isinstance(code, Permuted):
        inner = integers_of(code.inner, codes=codes)
        order, size = code.order.long(), _group_size(code.inner)
        places = torch.arange(order.numel())
        found, index = torch.empty_like(inner.codes), torch.empty(order.numel(), dtype=torch.int32)
        if codes:
            found[:, order] = inner.codes
        index[order] = (places // size).to(torch.int32)
        return Integers(found, inner.scales, inner.zero_points, index)
    if isinstance(code, Uniform):
        found = unpack_bits(code.codes, code.shape[0] * code.shape[1], code.bits).view(code.shape) if codes else NONE
        points = code.zero_points
        if points is not None:
            points = unpack_bits(points, code.scales.numel(), code.bits).view(code.scales.shape)
        return Integers(found, code.scales, points)
    if isinstance(code, TritPlanes) and grid_of(code.spec) is not None:
        return _of_planes(code, codes)
    raise ValueError(f"a code of the kind {code.kind} is no integers with scales")


def _of_planes(code: TritPlanes, codes: bool) -> Integers:
    """Digits weighted and added up; a sign of a scale belongs to its digits."""
    scales = code.scales if code.scales.dim() == 2 else code.scales[:, :, 0]
    if not codes:
        return Integers(NONE, scales.abs(), None)
    weights = _weights(code.spec)
    signed = (code.unpack() * torch.tensor(weights, dtype=torch.int8).view(-1, 1, 1)).sum(0, dtype=torch.int8)
    if bool((scales < 0).any()):
        flip = torch.where(scales < 0, -1, 1).to(torch.int8)
        signed = signed * flip[:, torch.arange(code.shape[1]) // _group_size(code)]
    return Integers((signed + (1 << sum(weights).bit_length())).to(torch.uint8), scales.abs(), None)


def _weights(spec: dict[str, Any]) -> tuple[int, ...]:
    planes = int(spec["planes"])
    if not spec.get("tied", False):
        return (1,) * planes
    return tuple(spec.get("weights") or tied_weights(planes))


def _group_size(code: Code) -> int:
    size = getattr(code, "group_size", None)
    return min(size or code.shape[1], code.shape[1])


def _scale_dtype(spec: dict[str, Any]) -> torch.dtype:
    named = spec.get("scale_dtype", "float16")
    return torch.float32 if named == LOG8 else DTYPES[named]
