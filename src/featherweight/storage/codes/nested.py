"""What codes that contain codes share: specs without the shape they inherit, stored tensors under prefixed names.

A wrapper's spec holds the specs of its parts without `shape` (a part has the wrapper's shape), and its stored tensors
are those of the parts with a prefix: `inner_scales`, `terms_0_trits`, `inner_terms_1_values`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.storage.codes.base import Code, TensorLayout, code_from, code_layout, matrix_shape

DEEPEST = 8
"""Wrappers within wrappers; a spec from a file could otherwise exhaust the stack."""

INT16_COLUMNS = 1 << 15
"""Up to this many columns, a column index fits int16."""


def index_dtype(columns: int) -> torch.dtype:
    """The dtype in which column indices of a matrix with this many columns are stored."""
    return torch.int16 if columns <= INT16_COLUMNS else torch.int32


def bare_spec(code: Code) -> dict[str, Any]:
    """The spec of a part, without its shape."""
    return {name: value for name, value in code.spec.items() if name != "shape"}


def part_spec(spec: dict[str, Any], part: Any, field: str) -> dict[str, Any]:
    """The complete spec of the part `part` of a wrapper with this spec. ValueError if it is none."""
    if not isinstance(part, dict) or not isinstance(part.get("kind"), str):
        raise ValueError(f"{field} is {shown(part)}, expected the spec of a code with a kind")
    if _depth(part) > DEEPEST:
        raise ValueError(f"{field} has parts within parts more than {DEEPEST} deep")
    shape = list(matrix_shape(spec))
    if part.get("shape", shape) not in (shape, tuple(shape)):
        raise ValueError(f"{field} has shape {part['shape']}, expected that of the whole, {shape}")
    return {**part, "shape": shape}


def _depth(spec: dict[str, Any]) -> int:
    """Levels of parts in a spec, counted no further than one beyond DEEPEST."""
    level, depth = [spec], 0
    while level and depth <= DEEPEST:
        parts = [part for one in level for part in (one.get("inner"), *_listed(one.get("terms")))]
        level, depth = [part for part in parts if isinstance(part, dict)], depth + 1
    return depth


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def part_layout(spec: dict[str, Any], part: Any, prefix: str) -> dict[str, TensorLayout]:
    """The layout of a part under its prefixed names."""
    layout = code_layout(part_spec(spec, part, prefix.removesuffix("_")))
    return {prefix + name: entry for name, entry in layout.items()}


def part_tensors(code: Code, prefix: str) -> dict[str, Tensor]:
    """The stored tensors of a part under their prefixed names."""
    return {prefix + name: tensor for name, tensor in code.tensors().items()}


def part_from(spec: dict[str, Any], part: Any, prefix: str, tensors: dict[str, Tensor]) -> Code:
    """Rebuild a part from the tensors of the whole."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return code_from(part_spec(spec, part, prefix.removesuffix("_")), own)
