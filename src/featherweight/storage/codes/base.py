"""`Code`: what a weight matrix has become.

Whatever is measured is decoded from what is stored. A code therefore holds exactly the tensors that go to disk (fp16
scales, packed digits), and `decode` starts from those.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
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


class Grouping(NamedTuple):
    """Which weights share a set of levels: `size` neighbours along dimension `along`, 1 columns of a row, 0 rows of a
    column."""

    along: int
    size: int


class Cut(NamedTuple):
    """What a prefix needs of a stored tensor: its first `size` entries along `dim`, all of it where that is None."""

    tensor: str
    dim: int | None = None
    size: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The cut of the whole tensor, contiguous."""
        return tensor if self.dim is None else tensor.narrow(self.dim, 0, self.size).contiguous()


LARGEST_SIDE = (1 << 31) - 1
"""Rows and columns of a matrix are numbers of 32 bits, here as in the operators."""

WHOLE_BYTES = 40
"""Rows from a multiple of this on begin at a whole byte, whatever digits are packed: of 1 to 8 bits, or five a byte."""

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
    sides = shape if isinstance(shape, list | tuple) else ()
    if len(sides) != 2 or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in sides):
        raise ValueError(f"shape is {shown(shape)}, expected [out_features, in_features]")
    return sides[0], sides[1]


def whole_number(spec: dict[str, Any], field: str, low: int, high: int) -> int:
    """An integer setting of a spec within [low, high]."""
    value = spec.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field} is {shown(value)}, expected a whole number from {low} to {high}")
    return value


def groups_of(columns: int, group_size: int) -> int:
    """Groups in a row; the last one may be short."""
    return -(-columns // group_size)


def grouped(digits: Tensor, group_size: int, groups: int) -> Tensor:
    """Integers [planes, out, in] of any integer dtype, padded with zeros to whole groups: int8 [planes, out, groups,
    size], or int16 where they do not fit."""
    planes, rows, columns = digits.shape
    if int(digits.abs().amax()) < 128:
        digits = digits.to(torch.int8)
    size = min(group_size, columns)
    return torch.nn.functional.pad(digits, (0, groups * size - columns)).view(planes, rows, groups, size)


def ungrouped(digits: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`: [..., out, groups, size] without what pads the last group, [..., out, in]."""
    return digits.flatten(-2)[..., :columns]


class Code(abc.ABC):
    """A matrix [out_features, in_features] in the form in which it is stored.

    A kind registers itself with `@register("code", NAME)` and is rebuilt from `spec` (JSON) and `tensors()` alone:
    `code_from(code.spec, code.tensors())` is the same code. `layout(spec)` gives shapes and dtypes without data, which
    is what planning, module construction and verification need.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]
    factored: ClassVar[bool] = False
    """Whether a layer that decodes multiplies by its two `factors`, one after the other, rather than by the matrix."""

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
        """`decode()[first:last]`, bit for bit; kinds that can, decode these rows alone.

        Here for those that cannot, and for rows that begin inside a byte: the last rows before that begin a byte are
        asked for instead.
        """
        before = first % WHOLE_BYTES
        return self.decode_rows(first - before, last)[before:] if before else self.decode()[first:last]

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

    # What a kind may know about itself; the defaults are true of any kind -------------------------------------------

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        """A code with this spec in a few words, without its shape."""
        if "inner" not in spec:
            return f"{spec['kind']}{group_text(spec)}"
        bits = f" {spec['bits']} bit" if "bits" in spec else ""
        return f"{spec['kind']}{bits}{group_text(spec)} of {describe_part(spec, spec['inner'])}"

    @classmethod
    def input_rounding(cls, spec: dict[str, Any]) -> tuple[int, int] | None:
        """(bits, columns with one step) to which a layer with this code, outermost, rounds its input; None: it does
        not."""
        return None

    @classmethod
    def summands(cls, spec: dict[str, Any]) -> int:
        """How many matrices a code with this spec adds up that are stored one after the other; see `prefix`."""
        return 1

    @classmethod
    def prefix_of(cls, spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
        """The spec of the first `count` summands, 0 < count < `summands(spec)`, and what its tensors are cut from."""
        raise NotImplementedError(f"{cls.__name__} has more than one summand and does not say what a prefix is")

    def prefix(self, count: int) -> Code:
        """The code of the first `count` matrices of which this one is the sum, on the same stored values.

        Sums have terms, trit and binary planes have planes; codes of a changed basis have those of what they hold.
        Every other code is a sum of one. ValueError where there are fewer.
        """
        spec, cuts = code_prefix(self.spec, count)
        stored = self.tensors()
        return code_from(spec, {name: cut.of(stored[cut.tensor]) for name, cut in cuts.items()})

    def grouping(self) -> Grouping:
        """Which weights share a set of levels; whole rows for a code without groups."""
        columns = self.shape[1]
        return Grouping(1, min(int(getattr(self, "group_size", None) or columns), columns))

    def group_levels(self, row: int, group: int) -> list[float]:
        """Values that the weights of a group may take, ascending. In general, those that occur.

        `row` is that of the matrix, or its column where groups run along the rows (`grouping`).
        """
        size = self.grouping().size
        values: list[float] = np.unique(self.decode()[row, group * size : (group + 1) * size].numpy()).tolist()
        return values

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        """The code that has levels, `matrix` [out, in] as that code sees it, and in words what was done to the matrix.

        A code of a changed basis opens what it holds: `matrix` is then rotated, or its columns are in another order.
        Every other code is its own.
        """
        return self, matrix, ""

    @classmethod
    def of_rows(cls, parts: Sequence[Code]) -> Code:
        """The code of a matrix whose rows are those of `parts`, codes of this kind with equal settings, one below the
        other. ValueError for kinds of which that cannot be made."""
        raise ValueError(
            f"codes of the kind {parts[0].kind} cannot be made row by row, which calibration.guidance above 1 needs: "
            "set it to 1"
        )

    def row_fields(self) -> tuple[str, ...]:
        """Names of floating-point fields whose first dimension is the rows of the matrix and which, all multiplied by
        factors of the rows, give the matrix with its rows multiplied; none where there are no such."""
        return ()

    def rows_scaled(self, factors: Tensor) -> Code | None:
        """The code of diag(factors) W, digits unchanged and scales rounded to their stored type.

        factors : [out], positive. None where the code has no scales of single rows, or these would over- or underflow.
        """
        changed: dict[str, Any] = {}
        for field in self.row_fields():
            before: Tensor = getattr(self, field)
            after = (before.double() * factors.double().view(-1, *([1] * (before.dim() - 1)))).to(before.dtype)
            lost = (after == 0) & (before != 0) & (before.abs() >= torch.finfo(before.dtype).tiny)
            if bool(lost.any()) or not bool(after.isfinite().all()):
                return None
            changed[field] = after
        return self.replaced(changed) if changed else None

    def replaced(self, changes: dict[str, Any]) -> Code:
        """`dataclasses.replace`: all codes are dataclasses."""
        found: Code = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        return found

    def tunable_fields(self) -> tuple[str, ...]:
        """Names of the fields with floating-point tensors that may be trained with the digits fixed."""
        fields: tuple[Any, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = {field.name: getattr(self, field.name) for field in fields}
        return tuple(n for n, value in values.items() if isinstance(value, Tensor) and value.is_floating_point())

    def digits(self) -> Tensor | None:
        """Integers int8 or int16 [planes, out, groups, size] of which `scales` [out, groups, planes] times are the
        matrix; None where it is not that. Where there are `offsets`, they are the scales of a last plane."""
        return None

    def digits_nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """The digits, as `digits` gives them, with which these scales come nearest to values.

        values : float [out, groups, size]; scales : float [out, groups, planes], on the same device.
        NotImplementedError where digits cannot be chosen anew, which is so unless a kind says how.
        """
        raise NotImplementedError(f"codes of the kind {self.kind} keep their digits")

    def all_together(self, flags: Tensor) -> Tensor:
        """flags bool [out, groups, size]: where those of all weights are set whose digits are chosen together."""
        return flags

    def with_digits(self, digits: Tensor) -> Code:
        """This code with other digits, as `digits_nearest` gives them, in main memory. NotImplementedError as there."""
        raise NotImplementedError(f"codes of the kind {self.kind} keep their digits")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """float32 [out, k] and [k, in] whose product is the matrix, where the code is such; else None."""
        return None

    def decode_fast(self) -> Tensor:
        """The matrix as `decode` gives it but for rounding: sums in whatever order is fast here; differentiable in the
        floating-point tensors."""
        return self.decode()


class UnknownCodeError(CheckpointError):
    """A spec names a kind of code that is not here: a newer release, or a package that is not installed, wrote it."""


def code_class(spec: dict[str, Any]) -> type[Code]:
    """The class of the kind that a spec names; UnknownCodeError where there is none."""
    if "kind" not in spec:
        raise ValueError("the spec of a code has no kind")
    kind, known = spec["kind"], registered("code")
    if not isinstance(kind, str) or kind not in known:
        raise UnknownCodeError(
            f"this release knows no code of the kind {str(kind)[:80]!r}{nearest(str(kind), known)}: "
            f"update featherweight, or install the package that adds it{left_out()}"
        )
    return known[kind]


def describe_code(spec: dict[str, Any]) -> str:
    """A code in a few words: "2 trit-planes g128", "hadamard 128 of 4 bit asymmetric g128 + rank 8 int8"."""
    kind = spec["kind"]
    cls: type[Code] = (registered("code").get(kind) if isinstance(kind, str) else None) or Code
    return cls.describe(spec)


def describe_part(spec: dict[str, Any], part: dict[str, Any]) -> str:
    """`describe_code` of a part of a code, which has the shape of the whole unless it says otherwise."""
    return describe_code({**({"shape": spec["shape"]} if "shape" in spec else {}), **part})


def group_text(spec: dict[str, Any]) -> str:
    """The group size in a description: " g128", or nothing."""
    return f" g{spec['group_size']}" if spec.get("group_size") else ""


def plural(count: int, word: str) -> str:
    """ "1 plane", "2 planes"."""
    return f"{count} {word}{'s' if count > 1 else ''}"


def input_rounding(spec: dict[str, Any]) -> tuple[int, int] | None:
    """See `Code.input_rounding`, of the code with this spec. UnknownCodeError where there is no such kind."""
    return code_class(spec).input_rounding(spec)


def code_prefix(spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
    """The spec of the first `count` summands of a code, and for each of its tensors what it is cut from: see
    `Code.prefix`. ValueError where the code has fewer; otherwise raises like `code_layout`, which comes first."""
    names = code_layout(spec)
    cls = code_class(spec)
    most = cls.summands(spec)
    if type(count) is not int or not 1 <= count <= most:
        raise ValueError(
            f"the first {shown(count)} terms of a {spec['kind']} code are asked for, expected a whole number from 1 to "
            f"{most}, which it has"
        )
    return (dict(spec), {name: Cut(name) for name in names}) if count == most else cls.prefix_of(spec, count)


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
