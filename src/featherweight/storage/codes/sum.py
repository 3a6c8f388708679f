"""A sum of codes: W = (term 0 + term 1) + ..., in float32, in this order.

What corrections make: a quantised matrix plus a sparse matrix of outliers plus a low-rank matrix. The tensors of term i
are stored as `terms_i_NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.registry import register
from featherweight.storage.codes.base import Code, Cut, TensorLayout, describe_part, matrix_shape
from featherweight.storage.codes.nested import bare_spec, open_further, part_from, part_layout, part_spec, part_tensors


@register("code", "sum")
@dataclass(frozen=True)
class Sum(Code):
    """Two or more codes of equal shape. ValueError if there are fewer or the shapes differ."""

    terms: tuple[Code, ...]

    def __post_init__(self) -> None:
        if len(self.terms) < 2 or any(term.shape != self.terms[0].shape for term in self.terms):
            raise ValueError(f"a sum needs two or more terms of one shape, not {[list(t.shape) for t in self.terms]}")

    @classmethod
    def of(cls, *codes: Code) -> Sum:
        """The sum of codes; codes that are sums themselves give their terms."""
        return cls(tuple(term for code in codes for term in (code.terms if isinstance(code, Sum) else (code,))))

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.terms[0].shape

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "terms": [bare_spec(term) for term in self.terms]}

    def tensors(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for i, term in enumerate(self.terms):
            stored |= part_tensors(term, f"terms_{i}_")
        return stored

    def decode(self) -> Tensor:
        return self.decode_rows(0, self.shape[0])

    def decode_rows(self, first: int, last: int) -> Tensor:
        total = self.terms[0].decode_rows(first, last)
        for term in self.terms[1:]:
            total = total + term.decode_rows(first, last)
        return total

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        """The first term, for what the others leave it."""
        rest = sum((term.decode() for term in self.terms[1:]), torch.zeros(self.shape, dtype=torch.float32))
        return open_further(self.terms[0], matrix - rest, "less the other terms")

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        matrix_shape(spec)
        stored: dict[str, TensorLayout] = {}
        for i, term in enumerate(_terms(spec)):
            stored |= part_layout(spec, term, f"terms_{i}_")
        return stored

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Sum:
        return cls(tuple(part_from(spec, term, f"terms_{i}_", tensors) for i, term in enumerate(_terms(spec))))

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return " + ".join(describe_part(spec, term) for term in spec["terms"])

    @classmethod
    def summands(cls, spec: dict[str, Any]) -> int:
        return len(_terms(spec))

    @classmethod
    def prefix_of(cls, spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
        terms = _terms(spec)[:count]
        if count == 1:  # the term itself: a sum has two or more
            names = part_layout(spec, terms[0], "terms_0_")
            return part_spec(spec, terms[0], "terms_0"), {n.removeprefix("terms_0_"): Cut(n) for n in names}
        first = {**spec, "terms": terms}
        return first, {name: Cut(name) for name in cls.layout(first)}

    def rows_scaled(self, factors: Tensor) -> Code | None:
        terms = [term.rows_scaled(factors) for term in self.terms]
        known = [term for term in terms if term is not None]
        return Sum(tuple(known)) if len(known) == len(terms) else None


def _terms(spec: dict[str, Any]) -> list[Any]:
    terms = spec.get("terms")
    if not isinstance(terms, list | tuple) or len(terms) < 2:
        raise ValueError(f"terms is {shown(terms)}, expected a list of two or more specs")
    return list(terms)
