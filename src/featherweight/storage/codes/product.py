"""A product of two codes, each of any kind: W = A B, A [out, k] and B [k, in].

A dictionary times sparse coefficients (CoSpaDi, arXiv 2509.22075), a low-rank factorisation whose factors are quantised
by groups, factorisations into a structured and a sparse matrix. W[i, j] is the sum over k of A[i, k] B[k, j] in
float32, each product rounded before it is added, from the first k to the last.

A is `left`, B is `right`, whose specs carry a `shape` of their own where it is not that of the whole; the tensors are
stored as `left_NAME` and `right_NAME`. A layer need not make W: it computes A (B x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import WHOLE_BYTES, Code, TensorLayout, describe_part, matrix_shape
from featherweight.storage.codes.low_rank import ordered_product
from featherweight.storage.codes.nested import bare_spec, part_from, part_layout, part_spec, part_tensors

WIDEST = 16
"""k is at most this many times the longer side of the matrix: a wider product stores more than the matrix has."""

DECODED_AT_ONCE = 1 << 22
"""Elements of A that are decoded together: with more rows, A is never whole in memory."""


@register("code", "product")
@dataclass(frozen=True)
class Product(Code):
    """`left` [out, k] times `right` [k, in]. ValueError where they do not fit each other."""

    left: Code
    right: Code
    factored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"a product needs as many columns left as rows right, not {list(self.left.shape)} times "
                f"{list(self.right.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[0], self.right.shape[1]

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "left": bare_spec(self.left, self.shape),
            "right": bare_spec(self.right, self.shape),
        }

    def tensors(self) -> dict[str, Tensor]:
        return part_tensors(self.left, "left_") | part_tensors(self.right, "right_")

    def decode(self) -> Tensor:
        return self.decode_rows(0, self.shape[0])

    def decode_rows(self, first: int, last: int) -> Tensor:
        """B is decoded once, A in windows of rows."""
        right, step = self.right.decode(), _rows_together(self.left.shape[1])
        windows = ((begin, min(last, begin + step)) for begin in range(first, last, step))
        return torch.cat([ordered_product(self.left.decode_rows(*window), right) for window in windows])

    def factors(self) -> tuple[Tensor, Tensor]:
        """float32 [out, k] and [k, in]."""
        return self.left.decode(), self.right.decode()

    def decode_fast(self) -> Tensor:
        return self.left.decode_fast() @ self.right.decode_fast()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        left, right = (
            matrix_shape(part_spec(spec, spec.get(field), field, own_shape=True)) for field in ("left", "right")
        )
        if left[0] != rows or right[1] != columns or left[1] != right[0]:
            raise ValueError(
                f"left is {list(left)} and right {list(right)}, expected [{rows}, k] and [k, {columns}] for a product "
                f"[{rows}, {columns}]"
            )
        most = WIDEST * max(rows, columns)
        if left[1] > most:
            raise ValueError(f"left has {left[1]} columns, expected at most {most} for a product [{rows}, {columns}]")
        return part_layout(spec, spec["left"], "left_", own_shape=True) | part_layout(
            spec, spec["right"], "right_", own_shape=True
        )

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Product:
        return cls(
            part_from(spec, spec["left"], "left_", tensors, own_shape=True),
            part_from(spec, spec["right"], "right_", tensors, own_shape=True),
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        inner = spec["left"].get("shape", spec["shape"])[1]
        return f"product over {inner} of {describe_part(spec, spec['left'])} and {describe_part(spec, spec['right'])}"

    def rows_scaled(self, factors: Tensor) -> Code | None:
        left = self.left.rows_scaled(factors)
        return None if left is None else Product(left, self.right)


def _rows_together(inner: int) -> int:
    """Rows of A [.., inner] in a window: windows from row 0 begin at whole bytes."""
    return max(WHOLE_BYTES, DECODED_AT_ONCE // inner // WHOLE_BYTES * WHOLE_BYTES)
