"""A sparse matrix in compressed rows (CSR).

Stored: `row_pointers` int32 [out + 1], the entries of row i being row_pointers[i] to row_pointers[i + 1] - 1; `columns`
[entries] int16 (int32 for more than 32768 columns), ascending within a row; `values` [entries]. An index costs as much
as an fp16 value, and both are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, dtype_from, dtype_name, matrix_shape, whole_number
from featherweight.storage.codes.nested import index_dtype


@register("code", "sparse")
@dataclass(frozen=True)
class Sparse(Code):
    """See the module. ValueError where pointers or columns are damaged."""

    row_pointers: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        pointers, columns = self.row_pointers.long(), self.columns.long()
        if int(pointers[0]) != 0 or int(pointers[-1]) != columns.numel() or bool((pointers.diff() < 0).any()):
            raise ValueError(f"row_pointers do not rise from 0 to the number of entries, {columns.numel()}")
        if columns.numel() == 0:
            return
        if int(columns.min()) < 0 or int(columns.max()) >= self.shape[1]:
            raise ValueError(f"columns has an index outside of 0 to {self.shape[1] - 1}")
        places = self.places()
        if bool((places.diff() <= 0).any()):
            raise ValueError("columns are not in ascending order within each row")

    @classmethod
    def encode(cls, matrix: Tensor, mask: Tensor, dtype: torch.dtype = torch.float16) -> Sparse:
        """The entries of `matrix` [out, in] where `mask` (bool) is set, zeros among them."""
        rows, columns = matrix.shape
        pointers = torch.zeros(rows + 1, dtype=torch.int64)
        pointers[1:] = mask.sum(1).cumsum(0)
        return cls(
            pointers.to(torch.int32),
            mask.nonzero()[:, 1].to(index_dtype(columns)),
            matrix[mask].to(dtype),
            (rows, columns),
        )

    @property
    def entries(self) -> int:
        return self.values.numel()

    def places(self) -> Tensor:
        """Positions of the entries in the matrix read row by row: int64 [entries], ascending."""
        rows = torch.repeat_interleave(torch.arange(self.shape[0]), self.row_pointers.long().diff())
        return rows * self.shape[1] + self.columns.long()

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "entries": self.entries,
            "value_dtype": dtype_name(self.values.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"row_pointers": self.row_pointers, "columns": self.columns, "values": self.values}

    def decode(self) -> Tensor:
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float32)
        flat[self.places()] = self.values.float()
        return flat.view(self.shape)

    def decode_rows(self, first: int, last: int) -> Tensor:
        start, stop = int(self.row_pointers[first]), int(self.row_pointers[last])
        pointers = self.row_pointers[first : last + 1] - start
        shape = (last - first, self.shape[1])
        return Sparse(pointers, self.columns[start:stop], self.values[start:stop], shape).decode()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        entries = whole_number(spec, "entries", 0, rows * columns)
        return {
            "row_pointers": TensorLayout((rows + 1,), torch.int32),
            "columns": TensorLayout((entries,), index_dtype(columns)),
            "values": TensorLayout((entries,), dtype_from(spec, "value_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Sparse:
        return cls(tensors["row_pointers"], tensors["columns"], tensors["values"], matrix_shape(spec))

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"sparse {100 * spec['entries'] / math.prod(spec['shape']):.2g} %" if "shape" in spec else "sparse"
