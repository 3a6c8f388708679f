"""Signs times a matrix of low rank: W = S * (left right), elementwise, in float32, products summed in the order of k.

A block of BitStack (arXiv 2410.23918): one bit a weight, and the magnitudes as two factors. What `left right` has below
zero stays so. A stack of blocks is a `sum` of such codes, whose prefixes are the nested models.

Stored: `left` [out, k] and `right` [k, in] of a floating-point type, and `signs`, a string of bits row-major over the
whole matrix, 1 for +1 and 0 for -1, with zeros behind it up to an even number of bytes: what lies behind it in a file
is then aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, dtype_from, dtype_name, matrix_shape, whole_number
from featherweight.storage.codes.low_rank import ordered_product


def sign_bytes(count: int) -> int:
    """Bytes that the signs of so many weights take: whole pairs."""
    return 2 * -(-count // 16)


@register("code", "sign-factor")
@dataclass(frozen=True)
class SignFactor(Code):
    """`signs` uint8 [bytes] times `left` [out, k] `right` [k, in]."""

    signs: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def encode(cls, signs: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float16) -> SignFactor:
        """Pack `signs` [out, in], true for +1; round the factors to `dtype`."""
        bits = pack_bits(signs.reshape(-1).to(torch.uint8), 1)
        padded = torch.nn.functional.pad(bits, (0, sign_bytes(signs.numel()) - bits.numel()))
        return cls(padded, left.to(dtype).contiguous(), right.to(dtype).contiguous())

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "rank": self.rank,
            "factor_dtype": dtype_name(self.left.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "signs": self.signs}

    def unpack(self, first: int = 0, last: int | None = None) -> Tensor:
        """The signs of rows from `first`, which begins a byte, to before `last`: float32, -1 or 1."""
        rows, columns = self.shape
        last = rows if last is None else last
        count = (last - first) * columns
        bits = self.signs[first * columns // 8 :][: -(-count // 8)]
        return unpack_bits(bits, count, 1).view(last - first, columns).float() * 2 - 1

    def decode(self) -> Tensor:
        return self.decode_rows(0, self.shape[0])

    def decode_rows(self, first: int, last: int) -> Tensor:
        if first * self.shape[1] % 8:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        return ordered_product(self.left[first:last].float(), self.right.float()).mul_(self.unpack(first, last))

    def decode_fast(self) -> Tensor:
        return (self.left.float() @ self.right.float()) * self.unpack()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        rank = whole_number(spec, "rank", 1, min(rows, columns))
        dtype = dtype_from(spec, "factor_dtype", "float16")
        return {
            "left": TensorLayout((rows, rank), dtype),
            "right": TensorLayout((rank, columns), dtype),
            "signs": TensorLayout((sign_bytes(rows * columns),), torch.uint8),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> SignFactor:
        return cls(tensors["signs"], tensors["left"], tensors["right"])

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"signs x rank {spec['rank']} {spec.get('factor_dtype', 'float16')}"

    def row_fields(self) -> tuple[str, ...]:
        return ("left",)
