"""Uniform codes of 1 to 8 bits: W = scale (q - zero point), per group of input columns, or of output rows.

Stored: `codes` uint8, a dense little-endian bit string of b bits an element, row-major over the whole matrix; `scales`
[out, groups]; asymmetric also `zero_points` uint8, a bit string of b bits a group. Symmetric codes have the fixed zero
point 2^(b-1). With `axis: output` (AdaDim, arXiv 2309.15531) a group is `group_size` consecutive rows of one column,
and scales and zero points are [output groups, in].

With `offsets: true` floating-point `offsets` [out, groups], of the type of the scales, are in the place of zero points:
W = scale q + offset, in float32 first the product, then the sum. So blocks of other tools whose zero is no whole number
of steps are stored as they are (GGUF's Q4_1 and Q5_1, sub-blocks of its K-quants).
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
    ungrouped,
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
    offsets: Tensor | None = None  # [out, groups], of the type of the scales

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
        offsets: Tensor | None = None,
    ) -> Uniform:
        """Pack `codes` [out, in] and `zero_points`, of the shape of `scales`, whole numbers in [0, 2^bits).

        `offsets` [out, groups] in place of `zero_points` are rounded to `scale_dtype`, as scales are.
        """
        if offsets is not None and (zero_points is not None or axis != "input"):
            raise ValueError(
                "offsets stand in the place of zero points and belong to groups of input columns: "
                "leave out zero_points, and the axis output"
            )
        rows, columns = codes.shape
        packed = pack_bits(codes.reshape(-1).to(torch.uint8), bits)
        packed_zeros = None if zero_points is None else pack_bits(zero_points.reshape(-1).to(torch.uint8), bits)
        stored = None if offsets is None else offsets.to(scale_dtype)
        return cls(packed, scales.to(scale_dtype), packed_zeros, (rows, columns), bits, group_size, axis, stored)

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 2^(bits - 1) everywhere."""
        return self.zero_points is None and self.offsets is None

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
            **({} if self.offsets is None else {"offsets": True}),
        }

    def tensors(self) -> dict[str, Tensor]:
        named = {"zero_points": self.zero_points, "offsets": self.offsets}
        beside = {name: tensor for name, tensor in named.items() if tensor is not None}
        return {"codes": self.codes, "scales": self.scales, **beside}

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Codes [out, in] and zero points of the shape of `scales`, uint8; with offsets the zero points are 0."""
        codes = unpack_bits(self.codes, self.shape[0] * self.shape[1], self.bits).view(self.shape)
        if self.zero_points is None:
            zero = 1 << (self.bits - 1) if self.symmetric else 0
            return codes, torch.full_like(self.scales, zero, dtype=torch.uint8)
        zero_points = unpack_bits(self.zero_points, self.scales.numel(), self.bits)
        return codes, zero_points.view(self.scales.shape)

    def decode(self) -> Tensor:
        codes, zero_points = self.unpack()
        scales, zero_points = self._spread(self.scales.float()), self._spread(zero_points)
        scaled = (codes.to(torch.int16) - zero_points.to(torch.int16)).float() * scales
        return scaled if self.offsets is None else scaled + self._spread(self.offsets.float())

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
        offsets = None if self.offsets is None else self.offsets[first:last]
        shape, scales = (last - first, columns), self.scales[first:last]
        return Uniform(parts[0], scales, parts[1], shape, self.bits, self.group_size, offsets=offsets).decode()

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
        offsets, symmetric = spec.get("offsets", False), spec.get("symmetric", False)
        if type(offsets) is not bool:
            raise ValueError(f"offsets is {shown(offsets)}, expected true or false")
        if offsets and (symmetric or axis != "input"):
            raise ValueError("offsets is true, which codes that are symmetric or have the axis output cannot have")
        if offsets:
            stored["offsets"] = stored["scales"]
        elif not symmetric:
            stored["zero_points"] = TensorLayout((-(-grouped[0] * grouped[1] * bits // 8),), torch.uint8)
        return stored

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Uniform:
        offsets = spec.get("offsets", False)
        return cls(
            tensors["codes"],
            tensors["scales"],
            None if offsets else tensors.get("zero_points"),
            matrix_shape(spec),
            spec["bits"],
            spec["group_size"],
            spec.get("axis", "input"),
            tensors["offsets"] if offsets else None,
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        along = " of outputs" if spec.get("axis") == "output" else ""
        zero = "with offsets" if spec.get("offsets") else "symmetric" if spec["symmetric"] else "asymmetric"
        return f"{spec['bits']} bit {zero}{group_text(spec)}{along}"

    def grouping(self) -> Grouping:
        along = 1 if self.axis == "input" else 0
        return Grouping(along, min(self.group_size, self.shape[along]))

    def group_levels(self, row: int, group: int) -> list[float]:
        if self.axis == "output":
            row, group = group, row
        scale, zero_point = float(self.scales[row, group]), int(self.unpack()[1][row, group])
        offset = 0.0 if self.offsets is None else float(self.offsets[row, group])
        return sorted({scale * (q - zero_point) + offset for q in range(1 << self.bits)})

    @classmethod
    def of_rows(cls, parts: Sequence[Code]) -> Uniform:
        own = [part for part in parts if isinstance(part, Uniform) and part.axis == "input"]
        if len(own) != len(parts):
            raise ValueError("groups of outputs cannot be made row by row: set calibration.guidance to 1")
        codes, zeros = (torch.cat(values) for values in zip(*(part.unpack() for part in own), strict=True))
        scales, first = torch.cat([part.scales for part in own]), own[0]
        zero_points = None if first.zero_points is None else zeros
        below = [part.offsets for part in own if part.offsets is not None]
        offsets = torch.cat(below) if below else None
        bits, size = first.bits, first.group_size
        return cls.encode(codes, scales, zero_points, bits, size, scale_dtype=scales.dtype, offsets=offsets)

    def row_fields(self) -> tuple[str, ...]:
        if self.axis != "input":
            return ()
        return ("scales",) if self.offsets is None else ("scales", "offsets")

    def digits(self) -> Tensor | None:
        if self.axis != "input":
            return None
        codes, zero_points = (t.to(torch.int16) for t in self.unpack())
        integers = codes - zero_points.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]
        planes = [integers] if self.offsets is None else [integers, torch.ones_like(integers)]
        return grouped(torch.stack(planes), self.group_size, self.scales.shape[1])

    def digits_nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        if self.axis != "input":
            raise NotImplementedError("uniform codes in groups of outputs keep their digits")
        scale, zeros = scales[..., :1], self.unpack()[1].to(values.device).to(torch.int16).unsqueeze(-1)
        below = values if self.offsets is None else values - scales[..., 1:]
        relative = below / torch.where(scale == 0, torch.ones_like(scale), scale)
        integers = relative.round().clamp(-1024, 1024).to(torch.int16)
        integers = integers.clamp(-zeros, (1 << self.bits) - 1 - zeros)
        planes = [integers] if self.offsets is None else [integers, torch.ones_like(integers)]
        return torch.stack(planes)

    def with_digits(self, digits: Tensor) -> Uniform:
        zeros = self.unpack()[1].to(torch.int16).unsqueeze(-1)
        codes = ungrouped(digits[0].to(torch.int16) + zeros, self.shape[1])
        packed = pack_bits(codes.reshape(-1).to(torch.uint8), self.bits)
        return self.replaced({"codes": packed})  # type: ignore[return-value]
