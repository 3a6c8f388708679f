"""Uniform codes of 1 to 8 bits: W = scale (q - zero point), per group of input columns, or of output rows.

Stored: `codes` uint8, a dense little-endian bit string of b bits an element, row-major over the whole matrix; `scales`
[out, groups]; asymmetric also `zero_points` uint8, a bit string of b bits a group. Symmetric codes have the fixed zero
point 2^(b-1). With `axis: output` (AdaDim, arXiv 2309.15531) a group is `group_size` consecutive rows of one column,
and scales and zero points are [output groups, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    Grouping,
    TensorLayout,
    dtype_from,
    dtype_name,
    group_text,
    grouped,
    groups_of,
    matrix_shape,
    whole_number,
)

Axis = Literal["input", "output"]


@register("code", "uniform")
@dataclass(frozen=True)
class Uniform(Code):
    """See the module. `group_size` counts input columns, or rows for the axis output; the last may be shorter."""

    codes: Tensor  # uint8 [bytes]
    scales: Tensor  # [out, groups], or [groups, in]
    zero_points: Tensor | None  # uint8 [bytes], None if symmetric
    shape: tuple[int, int]
    bits: int
    group_size: int
    axis: Axis = "input"

    @classmethod
    def encode(
        cls,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        bits: int,
        group_size: int,
        *,
        scale_dtype: torch.dtype = torch.float16,
        axis: Axis = "input",
    ) -> Uniform:
        """Pack `codes` [out, in] and `zero_points`, of the shape of `scales`, whole numbers in [0, 2^bits)."""
        rows, columns = codes.shape
        packed = pack_bits(codes.reshape(-1).to(torch.uint8), bits)
        packed_zeros = None if zero_points is None else pack_bits(zero_points.reshape(-1).to(torch.uint8), bits)
        return cls(packed, scales.to(scale_dtype), packed_zeros, (rows, columns), bits, group_size, axis)

    @property
    def symmetric(self) -> bool:
        return self.zero_points is None

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(self.scales.dtype),
            **({} if self.axis == "input" else {"axis": self.axis}),
        }

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self.codes, "scales": self.scales}
        return stored if self.zero_points is None else stored | {"zero_points": self.zero_points}

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and zero points of the shape of `scales`, uint8."""
        codes = unpack_bits(self.codes, self.shape[0] * self.shape[1], self.bits).view(self.shape)
        if self.zero_points is None:
            return codes, torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.uint8)
        zero_points = unpack_bits(self.zero_points, self.scales.numel(), self.bits)
        return codes, zero_points.view(self.scales.shape)

    def decode(self) -> Tensor:
        codes, zero_points = self.unpack()
        scales, zero_points = self._spread(self.scales.float()), self._spread(zero_points)
        return (codes.to(torch.int16) - zero_points.to(torch.int16)).float() * scales

    def _spread(self, parameters: Tensor) -> Tensor:
        """A parameter of each group to a parameter of each weight."""
        along = 1 if self.axis == "input" else 0
        return parameters.index_select(along, torch.arange(self.shape[along]) // self.group_size)

    def decode_rows(self, first: int, last: int) -> Tensor:
        (_, columns), groups = self.shape, self.scales.shape[1]
        within = first * columns * self.bits % 8 or first * groups * self.bits % 8
        if within or self.axis == "output":  # the rows begin inside a byte
            return super().decode_rows(first, last)
        parts = [
            None if t is None else t[first * n * self.bits // 8 : -(-last * n * self.bits // 8)]
            for t, n in ((self.codes, columns), (self.zero_points, groups))
        ]
        assert parts[0] is not None
        shape = (last - first, columns)
        return Uniform(parts[0], self.scales[first:last], parts[1], shape, self.bits, self.group_size).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        bits = whole_number(spec, "bits", 1, 8)
        size = whole_number(spec, "group_size", 1, 1 << 30)
        axis = spec.get("axis", "input")
        if axis not in ("input", "output"):
            raise ValueError(f"axis is {shown(axis)}, expected input or output")
        grouped = (rows, groups_of(columns, size)) if axis == "input" else (groups_of(rows, size), columns)
        stored = {
            "codes": TensorLayout((-(-rows * columns * bits // 8),), torch.uint8),
            "scales": TensorLayout(grouped, dtype_from(spec, "scale_dtype", "float16")),
        }
        if not spec.get("symmetric", False):
            stored["zero_points"] = TensorLayout((-(-grouped[0] * grouped[1] * bits // 8),), torch.uint8)
        return stored

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Uniform:
        return cls(
            tensors["codes"],
            tensors["scales"],
            tensors.get("zero_points"),
            matrix_shape(spec),
            spec["bits"],
            spec["group_size"],
            spec.get("axis", "input"),
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        along = " of outputs" if spec.get("axis") == "output" else ""
        return f"{spec['bits']} bit {'symmetric' if spec['symmetric'] else 'asymmetric'}{group_text(spec)}{along}"

    def grouping(self) -> Grouping:
        along = 1 if self.axis == "input" else 0
        return Grouping(along, min(self.group_size, self.shape[along]))

    def group_levels(self, row: int, group: int) -> list[float]:
        if self.axis == "output":
            row, group = group, row
        scale, zero_point = float(self.scales[row, group]), int(self.unpack()[1][row, group])
        return sorted({scale * (q - zero_point) for q in range(1 << self.bits)})

    @classmethod
    def of_rows(cls, parts: Sequence[Code]) -> Uniform:
        own = [part for part in parts if isinstance(part, Uniform) and part.axis == "input"]
        if len(own) != len(parts):
            raise ValueError("groups of outputs cannot be made row by row: set calibration.guidance to 1")
        codes, zeros = (torch.cat(values) for values in zip(*(part.unpack() for part in own), strict=True))
        scales, first = torch.cat([part.scales for part in own]), own[0]
        zero_points = None if first.symmetric else zeros
        return cls.encode(codes, scales, zero_points, first.bits, first.group_size, scale_dtype=scales.dtype)

    def row_fields(self) -> tuple[str, ...]:
        return ("scales",) if self.axis == "input" else ()

    def digits(self) -> Tensor | None:
        if self.axis != "input":
            return None
        codes, zero_points = (t.to(torch.int16) for t in self.unpack())
        integers = codes - zero_points.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]
        return grouped(integers.unsqueeze(0), self.group_size, self.scales.shape[1])
