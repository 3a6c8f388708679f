"""A code whose columns are scaled: W = inner diag(c).

What an activation-aware scaling leaves where the division of the inputs cannot be folded into the layer before: the
matrix product may use c as a factor of the input instead, W x = inner (c x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, describe_part, dtype_from, dtype_name, matrix_shape
from featherweight.storage.codes.nested import Wrapper, bare_spec, open_further, part_from, part_layout, part_tensors


@register("code", "column-scaled")
@dataclass(frozen=True)
class ColumnScaled(Wrapper):
    """`column_scales` [in] times the columns of `inner`. ValueError where they do not fit."""

    inner: Code
    column_scales: Tensor

    def __post_init__(self) -> None:
        if tuple(self.column_scales.shape) != self.inner.shape[1:]:
            raise ValueError(f"column_scales are {list(self.column_scales.shape)}, expected [{self.inner.shape[1]}]")

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "scale_dtype": dtype_name(self.column_scales.dtype),
            "inner": bare_spec(self.inner),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"column_scales": self.column_scales} | part_tensors(self.inner, "inner_")

    def decode(self) -> Tensor:
        return self.inner.decode() * self.column_scales.float()

    def decode_rows(self, first: int, last: int) -> Tensor:
        return self.inner.decode_rows(first, last) * self.column_scales.float()

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        scales = self.column_scales.float()
        return open_further(self.inner, matrix / torch.where(scales == 0, 1.0, scales), "columns scaled")

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        _, columns = matrix_shape(spec)
        own = {"column_scales": TensorLayout((columns,), dtype_from(spec, "scale_dtype", "float16"))}
        return own | part_layout(spec, spec.get("inner"), "inner_")

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> ColumnScaled:
        return cls(part_from(spec, spec.get("inner"), "inner_", tensors), tensors["column_scales"])

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"column-scaled {describe_part(spec, spec['inner'])}"
