"""A code of a matrix whose columns were put in another order: inner = W[:, order].

Stored: `order` int16 (int32 for more than 32768 columns) [in]. The matrix product may gather the input instead,
W x = inner x[order].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, describe_part, matrix_shape
from featherweight.storage.codes.nested import (
    Wrapper,
    bare_spec,
    index_dtype,
    open_further,
    part_from,
    part_layout,
    part_tensors,
)


def inverse_order(order: Tensor) -> Tensor:
    """int64 [n]: the permutation that undoes `order` [n]: x[order][inverse_order(order)] == x. ValueError if none."""
    places = order.reshape(-1).long()
    count = places.numel()
    if order.dim() != 1 or not torch.equal(places.sort().values, torch.arange(count)):
        raise ValueError(f"order is not a permutation of 0 to {count - 1}")
    inverse = torch.empty_like(places)
    inverse[places] = torch.arange(count)
    return inverse


@register("code", "permuted")
@dataclass(frozen=True)
class Permuted(Wrapper):
    """See the module. Column i of `inner` is column `order[i]` of the matrix."""

    inner: Code
    order: Tensor

    @classmethod
    def encode(cls, inner: Code, order: Tensor) -> Permuted:
        """With `order`, any integer dtype, in its stored one. ValueError if it is no permutation of the columns."""
        if order.numel() != inner.shape[1]:
            raise ValueError(f"order has {order.numel()} entries for {inner.shape[1]} columns")
        inverse_order(order)
        return cls(inner, order.to(index_dtype(inner.shape[1])))

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "inner": bare_spec(self.inner)}

    def tensors(self) -> dict[str, Tensor]:
        return {"order": self.order} | part_tensors(self.inner, "inner_")

    def decode(self) -> Tensor:
        return self.inner.decode()[:, inverse_order(self.order)]

    def decode_rows(self, first: int, last: int) -> Tensor:
        return self.inner.decode_rows(first, last)[:, inverse_order(self.order)]

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        return open_further(self.inner, matrix[:, self.order.long()], "columns reordered")

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        _, columns = matrix_shape(spec)
        own = {"order": TensorLayout((columns,), index_dtype(columns))}
        return own | part_layout(spec, spec.get("inner"), "inner_")

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Permuted:
        inverse_order(tensors["order"])
        return cls(part_from(spec, spec.get("inner"), "inner_", tensors), tensors["order"])

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"permuted {describe_part(spec, spec['inner'])}"
