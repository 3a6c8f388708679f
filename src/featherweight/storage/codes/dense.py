"""A matrix kept as it is, in a floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, dtype_from, dtype_name, matrix_shape


@register("code", "dense")
@dataclass(frozen=True)
class Dense(Code):
    """`weight` [out_features, in_features] in any floating-point dtype."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "dtype": dtype_name(self.weight.dtype)}

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def decode(self) -> Tensor:
        return self.weight.float()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        return {"weight": TensorLayout(matrix_shape(spec), dtype_from(spec, "dtype", "bfloat16"))}

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Dense:
        return cls(tensors["weight"])

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"dense {spec['dtype']}"

    def row_fields(self) -> tuple[str, ...]:
        return ("weight",)

    def tunable_fields(self) -> tuple[str, ...]:
        return ()  # plain weights are left as they are
