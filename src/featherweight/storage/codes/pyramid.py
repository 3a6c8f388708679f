"""Pyramid codes: every vector of D weights is an amplitude times a direction y / |y| with y integer, sum |y_i| = K.

PVQ (arXiv 2410.16926); the format is reconstructed from classical pyramid vector quantisation (Fischer 1986) and the
published law of the amplitudes, since the paper's details were not available.

W[row, vector] = norm[row, group] * level[amplitude] * y / |y|. Stored: `directions` uint8, either (storage "index") the
number of y among all points of the pyramid, `index_bits(D, K)` bits a vector, or (storage "pulses") y_i + K in
ceil(log2(2 K + 1)) bits a weight, which is larger and quicker to read; `amplitudes` uint8, a bit string of
`amplitude_bits` bits a vector; `norms` [out, groups], a group being `group_size` columns, as a rule the whole row. The
levels follow from D, the columns of the group and `amplitude_bits` and are not stored. The last vector of a row is
padded with zeros to D weights; a vector of zeros has y = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    TensorLayout,
    dtype_from,
    dtype_name,
    groups_of,
    matrix_shape,
    whole_number,
)
from featherweight.storage.codes.pyramid_enumeration import (
    index_bits,
    indexed_points,
    pack_indices,
    point_indices,
    tables,
    unpack_indices,
)
from featherweight.storage.codes.pyramid_levels import LevelRule, amplitude_levels

Storage = Literal["index", "pulses"]

WHOLE_ROW = 1 << 30  # group size of norms that are those of rows
LARGEST_DIMENSION = 512
LARGEST_PULSES = 1024
DECODED_AT_ONCE = 1 << 16  # vectors


@register("code", "pyramid")
@dataclass(frozen=True)
class Pyramid(Code):
    """See the module. `dimension` is D, `pulses` is K; `group_size` columns, whole vectors, share a norm."""

    directions: Tensor  # uint8 [bytes]
    amplitudes: Tensor  # uint8 [bytes]
    norms: Tensor  # [out, groups]
    shape: tuple[int, int]
    group_size: int
    dimension: int
    pulses: int
    amplitude_bits: int
    levels: LevelRule = "lloyd-max"
    storage: Storage = "index"

    @classmethod
    def encode(
        cls,
        vectors: tuple[Tensor, Tensor],
        norms: Tensor,
        columns: int,
        group_size: int,
        pulses: int,
        amplitude_bits: int,
        *,
        levels: LevelRule = "lloyd-max",
        storage: Storage = "index",
    ) -> Pyramid:
        """Pack points integer [out, vectors, D] (on the pyramid or zero) and indices of amplitudes [out, vectors]."""
        points, amplitudes = vectors
        rows, _, size = points.shape
        directions = _pack_directions(points.reshape(-1, size), pulses, storage)
        packed = pack_bits(amplitudes.reshape(-1).to(torch.uint8), amplitude_bits)
        shape = (rows, columns)
        return cls(directions, packed, norms, shape, group_size, size, pulses, amplitude_bits, levels, storage)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            **spec_groups(self.group_size),
            "dimension": self.dimension,
            "pulses": self.pulses,
            "amplitude_bits": self.amplitude_bits,
            "levels": self.levels,
            "storage": self.storage,
            "scale_dtype": dtype_name(self.norms.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"directions": self.directions, "amplitudes": self.amplitudes, "norms": self.norms}

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Points int64 [out, vectors, D] and amplitude indices uint8 [out, vectors]. ValueError if damaged."""
        rows, vectors = self.shape[0], groups_of(self.shape[1], self.dimension)
        points = _unpack_directions(self.directions, rows * vectors, self.dimension, self.pulses, self.storage)
        amplitudes = unpack_bits(self.amplitudes, rows * vectors, self.amplitude_bits)
        return points.view(rows, vectors, -1), amplitudes.view(rows, vectors)

    def decode(self) -> Tensor:
        points, amplitudes = self.unpack()
        rows, columns = self.shape
        group_of = torch.arange(points.shape[1]) * self.dimension // self.group_size
        widths = [min(self.group_size, columns - g * self.group_size) for g in range(self.norms.shape[1])]
        levels = level_values(self.dimension, widths, self.amplitude_bits, self.levels)
        decoded = pyramid_values(points, amplitudes, self.norms[:, group_of], levels[group_of])
        return decoded.reshape(rows, -1)[:, :columns].contiguous()

    def decode_rows(self, first: int, last: int) -> Tensor:
        vectors = groups_of(self.shape[1], self.dimension)
        cut = [
            (tensor, vectors * bits)
            for tensor, bits in (
                (self.directions, _direction_bits(self.dimension, self.pulses, self.storage)),
                (self.amplitudes, self.amplitude_bits),
            )
        ]
        if any(first * bits % 8 for _, bits in cut):  # the rows begin inside a byte
            return super().decode_rows(first, last)
        directions, amplitudes = (tensor[first * bits // 8 : -(-last * bits // 8)] for tensor, bits in cut)
        shape = (last - first, self.shape[1])
        stored = {"directions": directions, "amplitudes": amplitudes, "norms": self.norms[first:last]}
        return Pyramid.from_tensors({**self.spec, "shape": shape}, stored).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        size = whole_number(spec, "dimension", 1, LARGEST_DIMENSION)
        group_size = whole_number({"group_size": WHOLE_ROW, **spec}, "group_size", 1, WHOLE_ROW)
        if group_size % size and group_size < columns:
            raise ValueError(f"group_size is {group_size}, expected a multiple of dimension, {size}")
        pulses = whole_number(spec, "pulses", 1, LARGEST_PULSES)
        bits = whole_number(spec, "amplitude_bits", 1, 7)
        for field, default, known in (("levels", "lloyd-max", LevelRule), ("storage", "index", Storage)):
            if spec.get(field, default) not in get_args(known):
                raise ValueError(f"{field} is {shown(spec[field])}, expected {' or '.join(get_args(known))}")
        count = rows * groups_of(columns, size)
        width = _direction_bits(size, pulses, spec.get("storage", "index"))
        return {
            "directions": TensorLayout((-(-count * width // 8),), torch.uint8),
            "amplitudes": TensorLayout((-(-count * bits // 8),), torch.uint8),
            "norms": TensorLayout((rows, groups_of(columns, group_size)), dtype_from(spec, "scale_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Pyramid:
        return cls(
            tensors["directions"],
            tensors["amplitudes"],
            tensors["norms"],
            matrix_shape(spec),
            spec.get("group_size", WHOLE_ROW),
            spec["dimension"],
            spec["pulses"],
            spec["amplitude_bits"],
            spec.get("levels", "lloyd-max"),
            spec.get("storage", "index"),
        )


def spec_groups(group_size: int) -> dict[str, int]:
    """`group_size` as a spec has it: left out where norms are those of whole rows."""
    return {} if group_size >= WHOLE_ROW else {"group_size": group_size}


def level_values(dimension: int, columns: Sequence[int], bits: int, rule: LevelRule) -> Tensor:
    """Amplitude levels as shares of the norm, for groups of these numbers of columns: float32 [groups, 2^bits]."""
    return torch.tensor([amplitude_levels(dimension, n, bits, rule).values for n in columns], dtype=torch.float32)


def pyramid_values(points: Tensor, amplitudes: Tensor, norms: Tensor, levels: Tensor) -> Tensor:
    """((norm level) / |y|) y in float32, in this order: float32 [out, vectors, D].

    points : integer [out, vectors, D]; amplitudes : [out, vectors], indices of `levels` [vectors, 2^bits]; norms :
    [out, vectors]
    """
    lengths = points.square().sum(-1).clamp(min=1).float().sqrt()
    chosen = levels[torch.arange(len(levels), device=levels.device), amplitudes.long()]
    scales = norms.float() * chosen / lengths
    return points.float() * scales.unsqueeze(-1)


def _direction_bits(size: int, pulses: int, storage: Storage) -> int:
    """Bits a vector."""
    return index_bits(size, pulses) if storage == "index" else size * (2 * pulses).bit_length()


def _pack_directions(points: Tensor, pulses: int, storage: Storage) -> Tensor:
    size = points.shape[1]
    if storage == "index":
        codes = torch.cat([point_indices(part, pulses) for part in torch.split(points, DECODED_AT_ONCE)])
        return pack_indices(codes, index_bits(size, pulses), tables(size, pulses).limb_bits)
    bits = (2 * pulses).bit_length()
    return pack_indices((points.reshape(-1, 1) + pulses).long(), bits, bits)


def _unpack_directions(packed: Tensor, count: int, size: int, pulses: int, storage: Storage) -> Tensor:
    if storage == "index":
        codes = unpack_indices(packed, count, index_bits(size, pulses), tables(size, pulses).limb_bits)
        return torch.cat([indexed_points(part, size, pulses) for part in torch.split(codes, DECODED_AT_ONCE)])
    bits = (2 * pulses).bit_length()
    points = unpack_indices(packed, count * size, bits, bits).view(count, size) - pulses
    sums = points.abs().sum(1)
    if bool(((sums != pulses) & (sums != 0)).any()):
        raise ValueError(f"a vector's pulses do not add up to {pulses}")
    return points
