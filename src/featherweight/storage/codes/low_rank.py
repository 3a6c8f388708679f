"""A matrix of low rank as two factors: W = sum over k of left[:, k] right[k, :], in float32, in this order of k.

Factors are floating-point, or int8 with a scale for each row of each factor: left = left_scales[i] times int8,
right = right_scales[k] times int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, dtype_from, dtype_name, matrix_shape, whole_number

INT8_LARGEST = 127
IN_CACHE = 1 << 17  # elements of a product's rows: with what is added to them they fit a second-level cache


def _to_int8(factor: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 [rows, n] and scales [rows], symmetric; a row of zeros has the scale 0."""
    scales = (factor.abs().amax(1) / INT8_LARGEST).to(scale_dtype)
    divisors = scales.float().unsqueeze(1)
    steps = torch.where(divisors > 0, factor / divisors, torch.zeros_like(factor))
    return steps.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scales


def ordered_product(left: Tensor, right: Tensor) -> Tensor:
    """left [out, k] times right [k, in], float32, each sum in the order of k: the same bits on every machine.

    A matrix product of a library adds up in an order that depends on processor and threads. Rows are taken a few at a
    time, so that their sums stay in the cache.
    """
    rows, columns = left.shape[0], right.shape[1]
    total, step = left.new_empty(rows, columns), max(1, IN_CACHE // columns)
    spare = left.new_empty(min(step, rows), columns)
    for first in range(0, rows, step):
        part, sums = left[first : first + step], total[first : first + step]
        torch.mul(part[:, :1], right[:1], out=sums)
        for k in range(1, left.shape[1]):
            sums += torch.mul(part[:, k : k + 1], right[k : k + 1], out=spare[: len(part)])
    return total


@register("code", "low-rank")
@dataclass(frozen=True)
class LowRank(Code):
    """`left` [out, rank] times `right` [rank, in]; `left_scales` [out] and `right_scales` [rank] for int8 factors."""

    left: Tensor
    right: Tensor
    left_scales: Tensor | None = None
    right_scales: Tensor | None = None

    @classmethod
    def encode(
        cls, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float16, scale_dtype: torch.dtype = torch.float16
    ) -> LowRank:
        """Round float32 factors to `dtype`: float16, float32 or int8 (whose scales are of `scale_dtype`)."""
        if dtype != torch.int8:
            return cls(left.to(dtype), right.to(dtype))
        left_steps, left_scales = _to_int8(left.float(), scale_dtype)
        right_steps, right_scales = _to_int8(right.float(), scale_dtype)
        return cls(left_steps, right_steps, left_scales, right_scales)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def spec(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "shape": list(self.shape), "rank": self.rank}
        if self.left_scales is None:
            return plain | {"factor_dtype": dtype_name(self.left.dtype)}
        return plain | {"factor_dtype": "int8", "scale_dtype": dtype_name(self.left_scales.dtype)}

    def tensors(self) -> dict[str, Tensor]:
        stored = {"left": self.left, "right": self.right}
        if self.left_scales is not None and self.right_scales is not None:
            stored |= {"left_scales": self.left_scales, "right_scales": self.right_scales}
        return stored

    def factors(self) -> tuple[Tensor, Tensor]:
        """float32 [out, rank] and [rank, in]."""
        if self.left_scales is None or self.right_scales is None:
            return self.left.float(), self.right.float()
        left = self.left.float() * self.left_scales.float().unsqueeze(1)
        return left, self.right.float() * self.right_scales.float().unsqueeze(1)

    def decode(self) -> Tensor:
        return ordered_product(*self.factors())

    def decode_rows(self, first: int, last: int) -> Tensor:
        scales = None if self.left_scales is None else self.left_scales[first:last]
        return LowRank(self.left[first:last], self.right, scales, self.right_scales).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        rank = whole_number(spec, "rank", 1, min(rows, columns))
        quantised = spec.get("factor_dtype") == "int8"
        dtype = torch.int8 if quantised else dtype_from(spec, "factor_dtype", "float16")
        stored = {"left": TensorLayout((rows, rank), dtype), "right": TensorLayout((rank, columns), dtype)}
        if quantised:
            scale_dtype = dtype_from(spec, "scale_dtype", "float16")
            stored["left_scales"] = TensorLayout((rows,), scale_dtype)
            stored["right_scales"] = TensorLayout((rank,), scale_dtype)
        return stored

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> LowRank:
        return cls(tensors["left"], tensors["right"], tensors.get("left_scales"), tensors.get("right_scales"))

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"rank {spec['rank']} {spec.get('factor_dtype', 'float16')}"

    def decode_fast(self) -> Tensor:
        left, right = self.factors()
        return left @ right
