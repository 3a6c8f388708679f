"""Trit-planes: W = sum over K planes of scale times ternary digit, scales per group of input columns.

PTQTP (arXiv 2509.16989), section 3, for K = 2 and free scales. K = 1 and 3 and tied scales (one scale s a group,
plane k weighted 3^(K-1-k) s, so that the planes are the digits of one balanced-ternary integer) are extensions.

Stored: `trits` uint8 [K, bytes], each plane row-major over the whole matrix without padding between rows, five trits a
byte (base3, 1.6 bits) or four (2bit); `scales` [out, groups, K], tied [out, groups], fp16 unless they do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.codes.base import Code, TensorLayout, dtype_from, dtype_name, groups_of, matrix_shape, whole_number
from featherweight.kernels.packing import Packing, decode_trit_planes, pack_trits, unpack_trits
from featherweight.registry import register

TRITS_A_BYTE = {"base3": 5, "2bit": 4}


@register("code", "trit-planes")
@dataclass(frozen=True)
class TritPlanes(Code):
    """See the module. `group_size` counts input columns; the last group of a row may be shorter."""

    trits: Tensor  # uint8 [K, bytes]
    scales: Tensor  # [out, groups, K] or, tied, [out, groups]
    shape: tuple[int, int]
    group_size: int
    tied: bool = False
    packing: Packing = "base3"

    @classmethod
    def encode(
        cls,
        trits: Tensor,
        scales: Tensor,
        group_size: int,
        tied: bool = False,
        packing: Packing = "base3",
        scale_dtype: torch.dtype = torch.float16,
    ) -> TritPlanes:
        """Pack `trits` int8 [K, out, in] in {-1, 0, 1} and round `scales` to their stored dtype."""
        _, rows, columns = trits.shape
        packed = torch.stack([pack_trits(plane.reshape(-1), packing) for plane in trits])
        return cls(packed, scales.to(scale_dtype), (rows, columns), group_size, tied, packing)

    @property
    def planes(self) -> int:
        return self.trits.shape[0]

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "planes": self.planes,
            "tied": self.tied,
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype_name(self.scales.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"trits": self.trits, "scales": self.scales}

    def unpack(self) -> Tensor:
        """The trits: int8 [K, out, in]."""
        count = self.shape[0] * self.shape[1]
        return torch.stack([unpack_trits(plane, count, self.packing).view(self.shape) for plane in self.trits])

    def decode(self) -> Tensor:
        return decode_trit_planes(self.trits, self.scales, self.shape, self.group_size, self.packing)

    def decode_rows(self, first: int, last: int) -> Tensor:
        columns = self.shape[1]
        per_byte = TRITS_A_BYTE[self.packing]
        if first * columns % per_byte:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        trits = self.trits[:, first * columns // per_byte : -(-last * columns // per_byte)]
        shape = (last - first, columns)
        return decode_trit_planes(trits, self.scales[first:last], shape, self.group_size, self.packing)

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        planes = whole_number(spec, "planes", 1, 3)
        group_size = whole_number(spec, "group_size", 1, 1 << 30)
        packing = spec.get("packing", "base3")
        if packing not in TRITS_A_BYTE:
            raise ValueError(f"packing is {packing!r}, expected {' or '.join(TRITS_A_BYTE)}")
        groups = groups_of(columns, group_size)
        scales = (rows, groups) if spec.get("tied", False) else (rows, groups, planes)
        return {
            "trits": TensorLayout((planes, -(-rows * columns // TRITS_A_BYTE[packing])), torch.uint8),
            "scales": TensorLayout(scales, dtype_from(spec, "scale_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> TritPlanes:
        return cls(
            tensors["trits"],
            tensors["scales"],
            matrix_shape(spec),
            spec["group_size"],
            spec.get("tied", False),
            spec.get("packing", "base3"),
        )
