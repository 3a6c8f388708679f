"""What codes that contain codes share: specs without the shape they inherit, stored tensors under prefixed names.

A wrapper's spec holds the specs of its parts, without `shape` where that is the wrapper's, and its stored tensors are
those of the parts with a prefix: `inner_scales`, `terms_0_trits`, `inner_terms_1_values`. Only kinds that say so
(`product`) have parts of other shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.storage.codes.base import (
    Code,
    Cut,
    TensorLayout,
    code_class,
    code_from,
    code_layout,
    code_prefix,
    matrix_shape,
)

DEEPEST = 8
"""Wrappers within wrappers; a spec from a file could otherwise exhaust the stack."""

INT16_COLUMNS = 1 << 15
"""Up to this many columns, a column index fits int16."""


def index_dtype(columns: int) -> torch.dtype:
    """The dtype in which column indices of a matrix with this many columns are stored."""
    return torch.int16 if columns <= INT16_COLUMNS else torch.int32


def bare_spec(code: Code, whole: tuple[int, int] | None = None) -> dict[str, Any]:
    """The spec of a part, without its shape where that is the shape of the whole (None: it is)."""
    own = whole is not None and tuple(code.shape) != tuple(whole)
    return {name: value for name, value in code.spec.items() if own or name != "shape"}


def part_spec(spec: dict[str, Any], part: Any, field: str, *, own_shape: bool = False) -> dict[str, Any]:
    """The complete spec of the part `part` of a wrapper with this spec.

    `own_shape` says that the part may have another shape than the whole. ValueError if the part is none.
    """
    if not isinstance(part, dict) or not isinstance(part.get("kind"), str):
        raise ValueError(f"{field} is {shown(part)}, expected the spec of a code with a kind")
    if _depth(part) > DEEPEST:
        raise ValueError(f"{field} has parts within parts more than {DEEPEST} deep")
    shape = list(matrix_shape(spec))
    if own_shape and "shape" in part:
        try:
            shape = list(matrix_shape(part))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    if part.get("shape", shape) not in (shape, tuple(shape)):
        raise ValueError(f"{field} has shape {shown(part['shape'])}, expected that of the whole, {shape}")
    return {**part, "shape": shape}


def _depth(spec: dict[str, Any]) -> int:
    """Levels of parts in a spec, whatever fields they are in, counted no further than one beyond DEEPEST."""
    level, depth = [spec], 0
    while level and depth <= DEEPEST:
        values = [value for one in level for value in one.values()]
        values += [item for value in values if isinstance(value, list | tuple) for item in value]
        level, depth = [value for value in values if isinstance(value, dict) and "kind" in value], depth + 1
    return depth


def part_layout(spec: dict[str, Any], part: Any, prefix: str, *, own_shape: bool = False) -> dict[str, TensorLayout]:
    """The layout of a part under its prefixed names."""
    layout = code_layout(part_spec(spec, part, prefix.removesuffix("_"), own_shape=own_shape))
    return {prefix + name: entry for name, entry in layout.items()}


def part_tensors(code: Code, prefix: str) -> dict[str, Tensor]:
    """The stored tensors of a part under their prefixed names."""
    return {prefix + name: tensor for name, tensor in code.tensors().items()}


def part_from(
    spec: dict[str, Any], part: Any, prefix: str, tensors: dict[str, Tensor], *, own_shape: bool = False
) -> Code:
    """Rebuild a part from the tensors of the whole."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return code_from(part_spec(spec, part, prefix.removesuffix("_"), own_shape=own_shape), own)


class Wrapper(Code):
    """A code of one part, `inner`, of its own shape, whose matrix is linear in that of the part; its own tensors, if
    any, belong to columns."""

    inner: Code

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.shape

    @classmethod
    def summands(cls, spec: dict[str, Any]) -> int:
        inner = part_spec(spec, spec.get("inner"), "inner")
        return code_class(inner).summands(inner)

    @classmethod
    def prefix_of(cls, spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
        inner, cuts = code_prefix(part_spec(spec, spec.get("inner"), "inner"), count)
        own = {name: Cut(name) for name in cls.layout(spec) if not name.startswith("inner_")}
        parts = {f"inner_{name}": cut._replace(tensor=f"inner_{cut.tensor}") for name, cut in cuts.items()}
        return {**spec, "inner": {n: value for n, value in inner.items() if n != "shape"}}, own | parts

    def rows_scaled(self, factors: Tensor) -> Code | None:
        inner = self.inner.rows_scaled(factors)
        return None if inner is None else self.replaced({"inner": inner})


def open_further(inner: Code, matrix: Tensor, done: str) -> tuple[Code, Tensor, str]:
    """`Code.opened` of what a wrapper holds, with what the wrapper itself did to the matrix before it."""
    code, seen, further = inner.opened(matrix)
    return code, seen, f"{done}, {further}" if further else done
