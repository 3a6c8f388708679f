"""Stored codes as structs of the native library: what a matrix is packed from, for each kind that has a layout."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featherweight.model.products import structs as c
from featherweight.native.library import DTYPES, PACKINGS
from featherweight.storage.codes import Code
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.sherry import Sherry
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

Filled = tuple[c.CodeStruct, list[Tensor]]  # a struct, and the tensors it points to

LENGTHS = {
    "codes": "codes_bytes",
    "scales": "scales_bytes",
    "zero_points": "zero_bytes",
    "signs": "sign_bytes",
    "offsets": "offset_bytes",
}
"""Fields of `structs.CodeStruct` for the lengths of what others point to."""


def _scales(scales: Tensor) -> Tensor:
    return (scales.float() if scales.dtype == torch.float64 else scales).contiguous()


def _source(code: Code, group_size: int, keep: dict[str, Tensor | None], **fields: Any) -> Filled:
    rows, cols = code.shape
    pointers: dict[str, int | None] = {name: c.address(tensor) for name, tensor in keep.items()}
    pointers |= {LENGTHS[name]: c.size_of(tensor) for name, tensor in keep.items()}
    size = min(group_size, cols)
    struct = c.CodeStruct(
        kind=c.KINDS[code.kind], rows=rows, cols=cols, group_size=size, scale_rows=1, **pointers, **fields
    )
    return struct, [tensor for tensor in keep.values() if tensor is not None]


def _trit_planes(code: TritPlanes) -> Filled:
    if code.tied and code.planes == 1 and code.weights is not None:  # a weight of one plane belongs to its scales
        scales = code.scales.float().unsqueeze(-1) * code.weights[0]
        code = TritPlanes(code.trits, scales, code.shape, code.group_size, packing=code.packing)
    if code.log8 is not None:
        scales, exponent = code.log8
        dtype = c.LOG8_SCALES
    else:
        scales, exponent = _scales(code.scales), 0
        dtype = DTYPES[scales.dtype]
    weights = code.plane_weights if code.tied else (0,) * code.planes
    return _source(
        code,
        code.group_size,
        {"codes": code.trits.contiguous(), "scales": scales.contiguous()},
        planes=code.planes,
        packing=PACKINGS[code.packing],
        tied=int(code.tied),
        weights=(ctypes.c_int32 * 3)(*weights),
        plane_bytes=code.trits.shape[1],
        scale_dtype=dtype,
        scale_exponent=exponent,
    )


def _uniform(code: Uniform) -> Filled:
    scales = _scales(code.scales)
    zeros = None if code.zero_points is None else code.zero_points.contiguous()
    offsets = None if code.offsets is None else _scales(code.offsets)
    keep = {"codes": code.codes.contiguous(), "scales": scales, "zero_points": zeros, "offsets": offsets}
    return _source(code, code.group_size, keep, bits=code.bits, scale_dtype=DTYPES[scales.dtype])


def _codebook(code: Codebook) -> Filled:
    scales = _scales(code.codebooks)
    keep: dict[str, Tensor | None] = {"codes": code.codes.contiguous(), "scales": scales}
    return _source(code, code.group_size or code.shape[1], keep, bits=code.bits, scale_dtype=DTYPES[scales.dtype])


def dense(code: Dense) -> Filled:
    weight = _scales(code.weight)
    return _source(code, code.shape[1], {"codes": weight}, scale_dtype=DTYPES[weight.dtype])


def _sherry(code: Sherry) -> Filled:
    scales = _scales(code.scales)
    keep: dict[str, Tensor | None] = {
        "codes": code.patterns.contiguous(),
        "signs": code.signs.contiguous(),
        "scales": scales,
    }
    return _source(code, code.group_size, keep, lane_stride=code.lane_stride, scale_dtype=DTYPES[scales.dtype])


FILL: dict[type[Code], Callable[[Any], Filled]] = {
    TritPlanes: _trit_planes,
    Uniform: _uniform,
    Codebook: _codebook,
    Dense: dense,
    Sherry: _sherry,
}
