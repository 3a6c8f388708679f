"""A code of a matrix whose layer rounds its input before the product: FlexQ's activation rule (arXiv 2508.04405).

The matrix is `inner`'s; nothing more is stored. A layer that holds such a code, outermost, rounds its input to `bits`
bits, symmetric, with a scale per token and `group_size` columns: see `featherweight.model.layers.activations`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, Grouping, TensorLayout, whole_number
from featherweight.storage.codes.nested import Wrapper, bare_spec, part_from, part_layout, part_tensors


@register("code", "quantized-input")
@dataclass(frozen=True)
class QuantizedInput(Wrapper):
    """See the module. 2 <= `bits` <= 16; `group_size` counts input columns."""

    inner: Code
    bits: int
    group_size: int

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "inner": bare_spec(self.inner),
        }

    def tensors(self) -> dict[str, Tensor]:
        return part_tensors(self.inner, "inner_")

    def decode(self) -> Tensor:
        return self.inner.decode()

    def decode_rows(self, first: int, last: int) -> Tensor:
        return self.inner.decode_rows(first, last)

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        whole_number(spec, "bits", 2, 16)
        whole_number(spec, "group_size", 1, 1 << 30)
        return part_layout(spec, spec.get("inner"), "inner_")

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedInput:
        return cls(part_from(spec, spec.get("inner"), "inner_", tensors), spec["bits"], spec["group_size"])

    @classmethod
    def input_rounding(cls, spec: dict[str, Any]) -> tuple[int, int]:
        return spec["bits"], spec["group_size"]

    def grouping(self) -> Grouping:
        return self.inner.grouping()  # its own group size is that of the input

    def group_levels(self, row: int, group: int) -> list[float]:
        return self.inner.group_levels(row, group)

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        return self.inner.opened(matrix)

    def rows_scaled(self, factors: Tensor) -> None:
        """A layer with a rule for its input is left as it is."""
        return None
