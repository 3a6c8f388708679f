"""`Code`: what a weight matrix has become.

Whatever is measured is decoded from what is stored. A code therefore holds exactly the tensors that go to disk (fp16
scales, packed digits), and `decode` starts from those.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from featherweight.errors import CheckpointError, shown
from featherweight.registry import left_out, nearest, registered


class TensorLayout(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from(spec: dict[str, Any], field: str, default: str) -> torch.dtype:
    """The floating-point dtype a spec names in `field`."""
    name = spec.get(field, default)
    if name not in DTYPES:
        raise ValueError(f"{field} is {shown(name)}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def matrix_shape(spec: dict[str, Any]) -> tuple[int, int]:
    """(out_features, in_features) of a spec."""
    shape = spec.get("shape")
    if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise ValueError(f"shape is {shown(shape)}, expected [out_features, in_features]")
    return shape[0], shape[1]


def whole_number(spec: dict[str, Any], field: str, low: int, high: int) -> int:
    """An integer setting of a spec within [low, high]."""
    value = spec.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field} is {shown(value)}, expected a whole number from {low} to {high}")
    return value


def groups_of(columns: int, group_size: int) -> int:
    """Groups in a row; the last one may be short."""
    return -(-columns // group_size)


class Code(abc.ABC):
    """A matrix [out_features, in_features] in the form in which it is stored.

    A kind registers itself with `@register("code", NAME)` and is rebuilt from `spec` (JSON) and `tensors()` alone:
    `code_from(code.spec, code.tensors())` is the same code. `layout(spec)` gives shapes and dtypes without data, which
    is what planning, module construction and verification need.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]

    @property
    @abc.abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON-able description: `kind`, `shape` and the settings of this kind."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name. Names are attribute names of a loaded module; none may be `bias`."""

    @abc.abstractmethod
    def decode(self) -> Tensor:
        """The matrix the stored tensors stand for: float32 [out_features, in_features], the same on every machine."""

    def decode_rows(self, first: int, last: int) -> Tensor:
        """`decode()[first:last]`; kinds that can, decode these rows alone."""
        return self.decode()[first:last]

    @classmethod
    @abc.abstractmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        """Shapes and dtypes of `tensors()` for a code with this spec. ValueError where the spec is wrong."""

    @classmethod
    @abc.abstractmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Code:
        """Rebuild from spec and stored tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points, indices, codebooks, everything."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (out_features in_features)."""
        return 8 * self.nbytes / math.prod(self.shape)


class UnknownCodeError(CheckpointError):
    """A spec names a kind of code that is not here: a newer release, or a package that is not installed, wrote it."""


def code_class(spec: dict[str, Any]) -> type[Code]:
    """The class of the kind that a spec names; UnknownCodeError where there is none."""
    kind, known = spec["kind"], registered("code")
    if not isinstance(kind, str) or kind not in known:
        raise UnknownCodeError(
            f"this release knows no code of the kind {str(kind)[:80]!r}{nearest(str(kind), known)}: "
            f"update featherweight, or install the package that adds it{left_out()}"
        )
    return known[kind]


def code_layout(spec: dict[str, Any]) -> dict[str, TensorLayout]:
    """Shapes and dtypes of the stored tensors of any kind of code.

    UnknownCodeError where its kind, or that of a part, is not known; ValueError, KeyError or TypeError where the spec
    is wrong.
    """
    return code_class(spec).layout(spec)


def code_from(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Code:
    """Rebuild any kind of code. Raises like `code_layout`; ValueError also if a tensor is missing or does not fit."""
    for name, (shape, dtype) in code_layout(spec).items():
        if name not in tensors:
            raise ValueError(f"tensor {name!r} of a {spec['kind']} code is missing")
        found = tensors[name]
        if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
            raise ValueError(
                f"tensor {name!r} of a {spec['kind']} code is {found.dtype} {list(found.shape)}, "
                f"expected {dtype} {list(shape)}"
            )
    return code_class(spec).from_tensors(spec, tensors)
