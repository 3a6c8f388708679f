"""A sparse matrix whose places are a bit each: cheaper than indices where more than one entry in sixteen is there.

Stored: `mask` uint8 [bytes], a bit for each element of the matrix read row by row, the lowest bit of a byte first, set
where there is an entry; and the entries in the same order, either as `values` [entries] in a floating-point type, or
as `codes` uint8 [bytes], a bit string of b bits an entry, with `scales` [out]: an entry of row i is then
scales[i] (q - 2^(b-1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, dtype_from, dtype_name, matrix_shape, whole_number
from featherweight.storage.codes.nested import index_dtype
from featherweight.storage.codes.sparse import Sparse


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many numbers of so many bits."""
    return -(-count * bits // 8)


@register("code", "masked")
@dataclass(frozen=True)
class Masked(Code):
    """See the module. `values`, or `codes` with `scales` and `bits`. ValueError where the mask is damaged."""

    mask: Tensor  # uint8 [bytes]
    entries: int
    shape: tuple[int, int]
    values: Tensor | None = None  # [entries]
    codes: Tensor | None = None  # uint8 [bytes]
    scales: Tensor | None = None  # [out]
    bits: int = 0

    def __post_init__(self) -> None:
        rows, columns = self.shape
        marked = unpack_bits(self.mask, 8 * self.mask.numel(), 1)
        if bool(marked[rows * columns :].any()):
            raise ValueError("mask has bits set behind the last element of the matrix")
        found = int(marked.sum())
        if found != self.entries:
            raise ValueError(f"mask has {found} bits set, and there are {self.entries} entries")

    @classmethod
    def encode(
        cls,
        matrix: Tensor,
        mask: Tensor,
        dtype: torch.dtype = torch.float16,
        *,
        bits: int = 0,
        scale_dtype: torch.dtype = torch.float16,
    ) -> Masked:
        """The entries of `matrix` [out, in] where `mask` (bool) is set.

        bits : 0, values in `dtype`; 2 to 8, whole numbers with a scale a row, symmetric, of `scale_dtype`
        """
        shape = (matrix.shape[0], matrix.shape[1])
        packed, entries = pack_bits(mask.reshape(-1).to(torch.uint8), 1), int(mask.sum())
        if not bits:
            return cls(packed, entries, shape, matrix[mask].to(dtype))
        middle = 1 << (bits - 1)
        kept = torch.where(mask, matrix, torch.zeros_like(matrix)).float()
        scales = (kept.abs().amax(1) / (middle - 1)).to(scale_dtype)
        divisors = scales.float().unsqueeze(1)
        steps = torch.where(divisors > 0, kept / divisors, torch.zeros_like(kept)).round().clamp(1 - middle, middle - 1)
        codes = pack_bits((steps + middle)[mask].to(torch.uint8), bits)
        return cls(packed, entries, shape, codes=codes, scales=scales, bits=bits)

    def places(self) -> Tensor:
        """Where there is an entry: bool [out, in]."""
        rows, columns = self.shape
        return unpack_bits(self.mask, rows * columns, 1).view(rows, columns).bool()

    def entry_values(self, places: Tensor | None = None) -> Tensor:
        """float32 [entries], row by row. places : `places()`, if known"""
        if self.values is not None:
            return self.values.float()
        assert self.codes is not None
        assert self.scales is not None
        steps = unpack_bits(self.codes, self.entries, self.bits).float() - (1 << (self.bits - 1))
        counts = (self.places() if places is None else places).sum(1)
        return torch.repeat_interleave(self.scales.float(), counts) * steps

    def in_rows(self) -> Sparse:
        """The same entries in compressed rows, which products take; values float32, or as they are stored."""
        places = self.places()
        rows, columns = self.shape
        pointers = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")
        pointers[1:] = places.sum(1).cumsum(0)
        values = self.entry_values(places) if self.values is None else self.values
        indices = places.nonzero()[:, 1].to(index_dtype(columns))
        return Sparse(pointers.to(torch.int32), indices, values, self.shape)

    @property
    def spec(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "shape": list(self.shape), "entries": self.entries}
        if self.values is not None:
            return plain | {"value_dtype": dtype_name(self.values.dtype)}
        assert self.scales is not None
        return plain | {"bits": self.bits, "scale_dtype": dtype_name(self.scales.dtype)}

    def tensors(self) -> dict[str, Tensor]:
        named = {"mask": self.mask, "values": self.values, "codes": self.codes, "scales": self.scales}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def decode(self) -> Tensor:
        places = self.places()
        matrix = torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        matrix[places] = self.entry_values(places)
        return matrix

    def decode_rows(self, first: int, last: int) -> Tensor:
        places = self.places()
        start, stop = int(places[:first].sum()), int(places[:last].sum())
        matrix = torch.zeros((last - first, self.shape[1]), dtype=torch.float32, device="cpu")
        matrix[places[first:last]] = self.entry_values(places)[start:stop]
        return matrix

    def row_fields(self) -> tuple[str, ...]:
        return ("scales",) if self.scales is not None else ()

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        entries = whole_number(spec, "entries", 0, rows * columns)
        stored = {"mask": TensorLayout((packed_bytes(rows * columns, 1),), torch.uint8)}
        if "bits" not in spec:
            return stored | {"values": TensorLayout((entries,), dtype_from(spec, "value_dtype", "float16"))}
        bits = whole_number(spec, "bits", 2, 8)
        return stored | {
            "codes": TensorLayout((packed_bytes(entries, bits),), torch.uint8),
            "scales": TensorLayout((rows,), dtype_from(spec, "scale_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Masked:
        return cls(
            tensors["mask"],
            spec["entries"],
            matrix_shape(spec),
            tensors.get("values"),
            tensors.get("codes"),
            tensors.get("scales"),
            spec.get("bits", 0),
        )

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        rows, columns = spec.get("shape", (0, 0))
        share = f" {100 * spec['entries'] / (rows * columns):.2g} %" if rows else ""
        return f"masked{share}" + (f" {spec['bits']} bit" if "bits" in spec else "")
