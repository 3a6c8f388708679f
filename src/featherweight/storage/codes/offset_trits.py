"""One trit-plane with an offset: W = scale t + offset, t in {-1, 0, 1}, per group of input columns.

PT2-LLM (arXiv 2510.03267). Stored: `trits` uint8 [bytes], packed like a plane of `trit-planes`; `scales` and `offsets`
[out, groups].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.native.packing import TRITS_PER_BYTE, Packing, decode_trit_planes, pack_trits, unpack_trits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    TensorLayout,
    dtype_from,
    dtype_name,
    group_text,
    grouped,
    groups_of,
    matrix_shape,
    ungrouped,
    whole_number,
)


@register("code", "offset-trits")
@dataclass(frozen=True)
class OffsetTrits(Code):
    """See the module. `group_size` counts input columns; the last group of a row may be shorter."""

    trits: Tensor  # uint8 [bytes]
    scales: Tensor  # [out, groups]
    offsets: Tensor  # [out, groups]
    shape: tuple[int, int]
    group_size: int
    packing: Packing = "base3"

    @classmethod
    def encode(
        cls,
        trits: Tensor,
        scales: Tensor,
        offsets: Tensor,
        group_size: int,
        packing: Packing = "base3",
        scale_dtype: torch.dtype = torch.float16,
    ) -> OffsetTrits:
        """Pack `trits` int8 [out, in] in {-1, 0, 1}; round `scales` and `offsets` [out, groups] to `scale_dtype`."""
        rows, columns = trits.shape
        packed = pack_trits(trits.reshape(-1), packing)
        return cls(packed, scales.to(scale_dtype), offsets.to(scale_dtype), (rows, columns), group_size, packing)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype_name(self.scales.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"trits": self.trits, "scales": self.scales, "offsets": self.offsets}

    def unpack(self) -> Tensor:
        """The trits: int8 [out, in]."""
        return unpack_trits(self.trits, self.shape[0] * self.shape[1], self.packing).view(self.shape)

    def decode(self) -> Tensor:
        plane, scales = self.trits.unsqueeze(0), self.scales.unsqueeze(-1)
        scaled = decode_trit_planes(plane, scales, self.shape, self.group_size, self.packing)
        return scaled + self.offsets.float()[:, torch.arange(self.shape[1]) // self.group_size]

    def decode_rows(self, first: int, last: int) -> Tensor:
        columns, per_byte = self.shape[1], TRITS_PER_BYTE[self.packing]
        if first * columns % per_byte:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        trits = self.trits[first * columns // per_byte : -(-last * columns // per_byte)]
        scales, offsets = self.scales[first:last], self.offsets[first:last]
        return OffsetTrits(trits, scales, offsets, (last - first, columns), self.group_size, self.packing).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        groups = groups_of(columns, whole_number(spec, "group_size", 1, 1 << 30))
        packing = spec.get("packing", "base3")
        if packing not in TRITS_PER_BYTE:
            raise ValueError(f"packing is {shown(packing)}, expected {' or '.join(TRITS_PER_BYTE)}")
        per_group = TensorLayout((rows, groups), dtype_from(spec, "scale_dtype", "float16"))
        trits = TensorLayout((-(-rows * columns // TRITS_PER_BYTE[packing]),), torch.uint8)
        return {"trits": trits, "scales": per_group, "offsets": per_group}

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> OffsetTrits:
        return cls(
            tensors["trits"],
            tensors["scales"],
            tensors["offsets"],
            matrix_shape(spec),
            spec["group_size"],
            spec.get("packing", "base3"),
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"1 trit-plane with offset{group_text(spec)}"

    def row_fields(self) -> tuple[str, ...]:
        return ("scales", "offsets")

    def digits(self) -> Tensor:
        trits = self.unpack()
        return grouped(torch.stack([trits, torch.ones_like(trits)]), self.group_size, self.scales.shape[1])

    def digits_nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        scale, offset = scales[..., :1], scales[..., 1:]
        relative = (values - offset) / torch.where(scale == 0, torch.ones_like(scale), scale)
        trits = relative.round().clamp(-1, 1).to(torch.int8)
        return torch.stack([trits, torch.ones_like(trits)])

    def with_digits(self, digits: Tensor) -> OffsetTrits:
        trits = ungrouped(digits[0], self.shape[1]).reshape(-1).contiguous()
        return self.replaced({"trits": pack_trits(trits, self.packing)})  # type: ignore[return-value]
