"""Non-uniform codes of 1 to 8 bits: every weight is an entry of its row's codebook (lookup table).

Stored: `codes` uint8, a bit string of b bits an element, row-major over the whole matrix; `codebooks`
[out, groups, 2^b]. A codebook serves `group_size` columns of a row, the whole row where there is no group_size
(SqueezeLLM, arXiv 2306.07629).
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
    TensorLayout,
    dtype_from,
    dtype_name,
    group_text,
    groups_of,
    matrix_shape,
    whole_number,
)


@register("code", "codebook")
@dataclass(frozen=True)
class Codebook(Code):
    """See the module. `group_size` None: one codebook a row."""

    codes: Tensor  # uint8 [bytes]
    codebooks: Tensor  # [out, groups, 2^bits]
    shape: tuple[int, int]
    bits: int
    group_size: int | None = None

    @classmethod
    def encode(
        cls, codes: Tensor, codebooks: Tensor, group_size: int | None = None, dtype: torch.dtype = torch.float16
    ) -> Codebook:
        """Pack `codes` [out, in] and round `codebooks` [out, groups, 2^b] (or [out, 2^b], one a row) to `dtype`."""
        if codebooks.dim() == 2:
            codebooks = codebooks.unsqueeze(1)
        bits = codebooks.shape[-1].bit_length() - 1
        rows, columns = codes.shape
        groups = 1 if group_size is None else groups_of(columns, group_size)
        if codebooks.shape != (rows, groups, 1 << bits):
            raise ValueError(f"codebooks are {list(codebooks.shape)}, expected [{rows}, {groups}, a power of two]")
        packed = pack_bits(codes.reshape(-1).to(torch.uint8), bits)
        return cls(packed, codebooks.to(dtype), (rows, columns), bits, group_size)

    @property
    def spec(self) -> dict[str, Any]:
        grouping = {} if self.group_size is None else {"group_size": self.group_size}
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.bits,
            **grouping,
            "codebook_dtype": dtype_name(self.codebooks.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "codebooks": self.codebooks}

    def unpack(self) -> Tensor:
        """The codes: uint8 [out, in]."""
        return unpack_bits(self.codes, self.shape[0] * self.shape[1], self.bits).view(self.shape)

    def decode(self) -> Tensor:
        (rows, columns), groups = self.shape, self.codebooks.shape[1]
        group = torch.arange(columns) // (self.group_size or columns)
        first = (torch.arange(rows).unsqueeze(1) * groups + group) << self.bits
        return self.codebooks.float().reshape(-1)[first + self.unpack()]

    def decode_rows(self, first: int, last: int) -> Tensor:
        columns = self.shape[1]
        if first * columns * self.bits % 8:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        codes = self.codes[first * columns * self.bits // 8 : -(-last * columns * self.bits // 8)]
        shape = (last - first, columns)
        return Codebook(codes, self.codebooks[first:last], shape, self.bits, self.group_size).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        bits = whole_number(spec, "bits", 1, 8)
        size = None if spec.get("group_size") is None else whole_number(spec, "group_size", 1, 1 << 30)
        groups = 1 if size is None else groups_of(columns, size)
        return {
            "codes": TensorLayout((-(-rows * columns * bits // 8),), torch.uint8),
            "codebooks": TensorLayout((rows, groups, 1 << bits), dtype_from(spec, "codebook_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Codebook:
        return cls(tensors["codes"], tensors["codebooks"], matrix_shape(spec), spec["bits"], spec.get("group_size"))

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"{spec['bits']} bit codebook{group_text(spec)}"

    def row_fields(self) -> tuple[str, ...]:
        return ("codebooks",)
