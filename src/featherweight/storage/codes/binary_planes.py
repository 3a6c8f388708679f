"""Binary planes: W = sum over K planes of scale times sign, in float32, from the first plane to the last.

A scale serves `group_size` input columns of `rows_per_scale` rows (all rows where there is none): 1 row and 128 columns
for D2Quant (arXiv 2602.02546), all rows or a strip of them and 1 or 8 columns for ShiftAddLLM (arXiv 2406.05981).
Scales are floating-point, or sums of T signed powers of two.

Stored: `signs` uint8 [K, bytes], each plane a string of bits row-major over the whole matrix, 1 for +1 and 0 for -1;
`scales` [strips, groups, K], or `shifts` int8 [strips, groups, K, T]: v stands for sign(v) 2^(|v| - exponent_bias),
0 for 0, and a scale is the sum of its T terms in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    Cut,
    TensorLayout,
    dtype_from,
    dtype_name,
    group_text,
    groups_of,
    matrix_shape,
    plural,
    whole_number,
)

EXPONENT_BIAS = 64
MOST_PLANES, MOST_TERMS = 8, 8


def power_of_two_terms(values: Tensor, terms: int, exponent_bias: int = EXPONENT_BIAS) -> Tensor:
    """Sums of powers of two near `values` (ShiftAddLLM, step c): shifts int8 [..., terms].

    Each term is the power of two whose logarithm is nearest to that of what the terms before leave. A rest too small
    for the int8 form gives 0, one too large the largest power.
    """
    rest, shifts = values.double(), []
    for _ in range(terms):
        mantissa, exponent = torch.frexp(rest.abs())  # rest = mantissa 2^exponent, mantissa in [1/2, 1)
        size = exponent - (mantissa < 0.5**0.5).to(exponent.dtype) + exponent_bias
        size = torch.where((rest == 0) | (size < 1), 0, size.clamp(max=127))
        shift = (size * rest.sign().to(size.dtype)).to(torch.int8)
        rest = rest - _powers(shift, exponent_bias, torch.float64)
        shifts.append(shift)
    return torch.stack(shifts, -1)


def _powers(shifts: Tensor, exponent_bias: int, dtype: torch.dtype = torch.float32) -> Tensor:
    positive = [0.0] + [2.0 ** (size - exponent_bias) for size in range(1, 128)]
    table = torch.tensor([*positive, 0.0, *[-value for value in reversed(positive[1:])]], dtype=dtype)
    return table[shifts.long() & 255]  # index 128 to 255: the shifts -128 to -1


def values_of_shifts(shifts: Tensor, exponent_bias: int = EXPONENT_BIAS) -> Tensor:
    """The sums float32 [...] that shifts int8 [..., terms] stand for."""
    powers = _powers(shifts, exponent_bias)
    total = powers[..., 0]
    for k in range(1, powers.shape[-1]):
        total = total + powers[..., k]
    return total


@register("code", "binary-planes")
@dataclass(frozen=True)
class BinaryPlanes(Code):
    """See the module. Exactly one of `scales` and `shifts` is there; `rows_per_scale` None: all rows."""

    signs: Tensor  # uint8 [K, bytes]
    scales: Tensor | None  # [strips, groups, K]
    shifts: Tensor | None  # int8 [strips, groups, K, T]
    shape: tuple[int, int]
    group_size: int
    rows_per_scale: int | None = 1
    exponent_bias: int = EXPONENT_BIAS

    @classmethod
    def encode(
        cls,
        signs: Tensor,
        scales: Tensor,
        group_size: int,
        rows_per_scale: int | None = 1,
        scale_dtype: torch.dtype = torch.float16,
    ) -> BinaryPlanes:
        """Pack `signs` [K, out, in], values -1 and 1; round `scales` [strips, groups, K] to `scale_dtype`."""
        shape = (signs.shape[1], signs.shape[2])
        return cls(_packed(signs), scales.to(scale_dtype), None, shape, group_size, rows_per_scale)

    @classmethod
    def encode_shifts(
        cls,
        signs: Tensor,
        shifts: Tensor,
        group_size: int,
        rows_per_scale: int | None = 1,
        exponent_bias: int = EXPONENT_BIAS,
    ) -> BinaryPlanes:
        """Pack `signs` [K, out, in], with `shifts` int8 [strips, groups, K, T] as of `power_of_two_terms`."""
        shape = (signs.shape[1], signs.shape[2])
        return cls(_packed(signs), None, shifts, shape, group_size, rows_per_scale, exponent_bias)

    @property
    def planes(self) -> int:
        return self.signs.shape[0]

    @property
    def spec(self) -> dict[str, Any]:
        plain = {
            "kind": self.kind,
            "shape": list(self.shape),
            "planes": self.planes,
            "group_size": self.group_size,
            "rows_per_scale": self.rows_per_scale,
        }
        if self.shifts is not None:
            return plain | {"shift_terms": self.shifts.shape[-1], "exponent_bias": self.exponent_bias}
        assert self.scales is not None
        return plain | {"scale_dtype": dtype_name(self.scales.dtype)}

    def tensors(self) -> dict[str, Tensor]:
        stored = {"signs": self.signs}
        if self.shifts is not None:
            return stored | {"shifts": self.shifts}
        assert self.scales is not None
        return stored | {"scales": self.scales}

    def unpack(self) -> Tensor:
        """The signs: int8 [K, out, in], -1 or 1."""
        count = self.shape[0] * self.shape[1]
        bits = torch.stack([unpack_bits(plane, count, 1) for plane in self.signs])
        return (bits.to(torch.int8) * 2 - 1).view(self.planes, *self.shape)

    def scale_values(self) -> Tensor:
        """The scales: float32 [strips, groups, K]."""
        if self.shifts is not None:
            return values_of_shifts(self.shifts, self.exponent_bias)
        assert self.scales is not None
        return self.scales.float()

    def decode(self) -> Tensor:
        return self._decoded(0, self.shape[0], self.unpack())

    def decode_rows(self, first: int, last: int) -> Tensor:
        columns = self.shape[1]
        if first * columns % 8:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        signs = self.signs[:, first * columns // 8 : -(-last * columns // 8)]
        part = BinaryPlanes(signs, self.scales, self.shifts, (last - first, columns), self.group_size)
        return self._decoded(first, last, part.unpack())

    def _decoded(self, first: int, last: int, signs: Tensor) -> Tensor:
        strip = torch.arange(first, last) // (self.rows_per_scale or self.shape[0])
        group = torch.arange(self.shape[1]) // self.group_size
        scales = self.scale_values()[int(strip[0]) : int(strip[-1]) + 1]
        strip = strip - strip[0]
        total = torch.zeros(last - first, self.shape[1], dtype=torch.float32)
        for k in range(self.planes):
            total += scales[:, :, k][strip][:, group] * signs[k]
        return total

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        planes = whole_number(spec, "planes", 1, MOST_PLANES)
        groups = groups_of(columns, whole_number(spec, "group_size", 1, 1 << 30))
        shared = spec.get("rows_per_scale", 1)
        strips = 1
        if shared is not None:
            strips = groups_of(rows, whole_number({"rows_per_scale": 1, **spec}, "rows_per_scale", 1, 1 << 30))
        stored = {"signs": TensorLayout((planes, -(-rows * columns // 8)), torch.uint8)}
        if spec.get("shift_terms") is None:
            dtype = dtype_from(spec, "scale_dtype", "float16")
            return stored | {"scales": TensorLayout((strips, groups, planes), dtype)}
        whole_number({"exponent_bias": EXPONENT_BIAS, **spec}, "exponent_bias", 0, 127)
        terms = whole_number(spec, "shift_terms", 1, MOST_TERMS)
        return stored | {"shifts": TensorLayout((strips, groups, planes, terms), torch.int8)}

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> BinaryPlanes:
        shifts = tensors.get("shifts")
        if shifts is not None and bool((shifts == -128).any()):
            raise ValueError("shifts has the value -128, which stands for no power of two")
        return cls(
            tensors["signs"],
            None if shifts is not None else tensors["scales"],
            shifts,
            matrix_shape(spec),
            spec["group_size"],
            spec.get("rows_per_scale", 1),
            spec.get("exponent_bias", EXPONENT_BIAS),
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        strip = spec.get("rows_per_scale", 1)
        rows = "" if strip == 1 else " all rows" if strip is None else f" x {strip} rows"
        shifts = f" in {spec['shift_terms']} shifts" if spec.get("shift_terms") else ""
        return f"{plural(spec['planes'], 'binary plane')}{group_text(spec)}{rows}{shifts}"

    @classmethod
    def summands(cls, spec: dict[str, Any]) -> int:
        return int(spec["planes"])

    @classmethod
    def prefix_of(cls, spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
        scales = {name: Cut(name, 2, count) for name in cls.layout(spec) if name != "signs"}
        return {**spec, "planes": count}, {"signs": Cut("signs", 0, count)} | scales

    def row_fields(self) -> tuple[str, ...]:
        return ("scales",) if self.scales is not None and self.rows_per_scale == 1 else ()


def _packed(signs: Tensor) -> Tensor:
    """Planes [K, out, in] of -1 and 1 to bit strings uint8 [K, bytes]. ValueError for other values."""
    if not bool(((signs == 1) | (signs == -1)).all()):
        raise ValueError("signs must be -1 or 1")
    return torch.stack([pack_bits((plane > 0).reshape(-1).to(torch.uint8), 1) for plane in signs])
