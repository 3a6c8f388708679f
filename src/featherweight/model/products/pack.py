"""Stored codes to the packed operands that the native products read.

A code becomes a sum of terms; a term is a chain of steps that the input goes through (gather, scale, rotate, round) and
an operand, two factors, or a sparse matrix. Wrappers turn into steps: W x = inner (step x). A product is two factors
where each is a single operand, and else two layers, called one after the other. A kind without a layout of its own is
decoded to a dense operand, and the reason is kept in `PackedLinear.note`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.model.products import structs as c
from featherweight.model.products.fill import FILL, dense
from featherweight.model.products.structs import Operand
from featherweight.native.library import DTYPES
from featherweight.native.packing import pack_trits
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard, random_signs
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sign_factor import SignFactor
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

NARROWEST_BINARY_GROUP = 16
"""Binary planes with narrower groups, or scales shared by columns, would cost more as scales than as a dense matrix."""

MOST_PAIRS = 4
"""Pairs of summands of two factors that are multiplied out: each pair reads both of its operands."""


@dataclass(frozen=True, eq=False)
class Step:
    """What the input goes through before a term, see fw_step: `tensor` holds the order int32 [in], or float32 [in]."""

    kind: str
    tensor: Tensor | None = None
    block: int = 0
    bits: int = 0

    def struct(self) -> c.StepStruct:
        order = self.tensor if self.kind == "permute" else None
        values = None if self.kind == "permute" else self.tensor
        count = 0 if self.tensor is None else self.tensor.numel()
        return c.StepStruct(c.STEPS[self.kind], self.block, self.bits, 0, count, c.address(order), c.address(values))


@dataclass(frozen=True, eq=False)
class Term:
    """One summand: an `operand`, a low-rank product (`operand` [out, r] times `right` [r, in]), a sparse matrix, or two
    layers in a row (`layers`, left [out, k] and right [k, in]), which the native library does not know."""

    steps: tuple[Step, ...]
    operand: Operand | None = None
    right: Operand | None = None
    row_pointers: Tensor | None = None  # int32 [out + 1]
    columns: Tensor | None = None  # int32 [entries]
    values: Tensor | None = None  # float32 [entries]
    layers: tuple[PackedLinear, ...] = ()

    @property
    def kind(self) -> str:
        if self.layers:
            return "product"
        if self.operand is None:
            return "sparse"
        return "operand" if self.right is None else "low-rank"

    @property
    def operands(self) -> tuple[Operand, ...]:
        own = tuple(one for one in (self.operand, self.right) if one is not None)
        return own + tuple(operand for layer in self.layers for operand in layer.operands)

    @property
    def layouts(self) -> tuple[str, ...]:
        if self.layers:
            return tuple(name for layer in self.layers for name in layer.layouts)
        return tuple(operand.layout for operand in self.operands) or ("sparse",)

    @property
    def sparse_tensors(self) -> tuple[Tensor, ...]:
        return tuple(one for one in (self.row_pointers, self.columns, self.values) if one is not None)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All tensors whose memory it keeps."""
        own = (*self.sparse_tensors, *(step.tensor for step in self.steps if step.tensor is not None))
        inner = tuple(tensor for layer in self.layers for term in layer.terms for tensor in term.held)
        return own + inner + tuple(operand.memory for operand in self.operands)

    def struct(self, steps: Any) -> c.TermStruct:
        memory = [None if one is None else one.memory for one in (self.operand, self.right)]
        matrix = (self.row_pointers, self.columns, self.values)
        sparse = [c.address(one) for one in matrix]
        pointers, columns, values = (0 if t is None else t.numel() for t in matrix)
        if columns != values:
            raise ValueError(f"a sparse matrix has {columns} columns for {values} values")
        return c.TermStruct(
            c.TERMS[self.kind], len(self.steps), ctypes.addressof(steps),
            *map(c.address, memory), *map(c.size_of, memory), *sparse, pointers, columns,
        )  # fmt: skip


class PackedLinear:
    """A linear layer as the native library takes it; keeps the memory that its structs point to.

    Attributes
    ----------
    address : address of the fw_linear struct; 0 where no term is the native library's.
    rows, cols : out_features, in_features.
    terms : the summands.
    products : those of them that are two layers in a row. A layer that has any is not the native library's alone.
    bias : float32 [out], or None.
    note : why something was decoded to a dense operand, else empty.
    """

    device_type = "cpu"

    def __init__(self, shape: tuple[int, int], terms: tuple[Term, ...], bias: Tensor | None, note: str = "") -> None:
        self.rows, self.cols = shape
        self.terms = terms
        self.bias = None if bias is None else bias.detach().to("cpu", torch.float32).contiguous()
        if self.bias is not None and tuple(self.bias.shape) != (self.rows,):
            raise ValueError(f"bias is {list(self.bias.shape)}, expected [{self.rows}]")
        self.note = note
        self._apply = c.needed().linear_apply
        native = [term for term in terms if not term.layers]
        self.products = tuple(term for term in terms if term.layers)
        self._steps = [(c.StepStruct * max(1, len(t.steps)))(*[step.struct() for step in t.steps]) for t in native]
        self._terms = (c.TermStruct * len(native))(*[t.struct(s) for t, s in zip(native, self._steps, strict=True)])
        self._linear = c.LinearStruct(
            self.rows, self.cols, len(native), ctypes.addressof(self._terms), c.address(self.bias)
        )
        self.address = ctypes.addressof(self._linear) if native else 0
        if not native:
            return
        status = c.needed().linear_check(self.address)
        c.check(status, f"a linear layer [{self.rows}, {self.cols}] whose parts do not fit it")

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(operand for term in self.terms for operand in term.operands)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts of the operands, in the order of the terms; "sparse" for a sparse matrix."""
        return tuple(name for term in self.terms for name in term.layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        tensors = [one for term in self.terms for one in term.held]
        tensors += [] if self.bias is None else [self.bias]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one matrix-vector product reads."""
        sparse = sum(t.numel() * t.element_size() for term in self.terms for t in term.sparse_tensors)
        own = sum(operand.weight_bytes for term in self.terms if not term.layers for operand in term.operands)
        return sparse + own + sum(layer.weight_bytes for term in self.products for layer in term.layers)

    def __call__(self, x: Tensor, precision: str = "float", threads: int | None = None) -> Tensor:
        """x [..., in] on the CPU, any float dtype -> [..., out] in the same dtype: one call of the native library.

        Products of two layers take further calls. Precision "int8" rounds the input of the first; what goes from one to
        the other is never rounded, as in a term of low rank.
        """
        if x.shape[-1] != self.cols:
            raise ValueError(f"the input has {x.shape[-1]} columns, the layer {self.cols}")
        inputs = x.detach().to(torch.float32).contiguous()
        out = torch.empty(*x.shape[:-1], self.rows, dtype=torch.float32)
        if out.numel() and self.address:
            status = self._apply(
                self.address, inputs.data_ptr(), inputs.numel(), out.numel() // self.rows, self.cols,
                out.data_ptr(), out.numel(), self.rows, c.PRECISIONS[precision], c.threads_of(threads),
            )  # fmt: skip
            c.check(status, "a linear layer")
        elif not self.address:
            out.copy_(torch.zeros(self.rows, dtype=torch.float32) if self.bias is None else self.bias)
        for left, right in (term.layers for term in self.products):
            out += left(right(inputs, precision, threads), "float", threads)
        return out.to(x.dtype)

    def weight_rows(self, rows: Sequence[int]) -> Tensor | None:
        """Rows of the matrix, float32 [len(rows), in]; None unless it is a single operand of the input itself."""
        if len(self.terms) != 1 or self.terms[0].kind != "operand" or self.terms[0].steps:
            return None
        memory, out = self.operands[0].memory, torch.empty(len(rows), self.cols, dtype=torch.float32)
        decode, place, size = c.needed().operand_rows, out.data_ptr(), self.cols * out.element_size()
        for i, row in enumerate(rows):
            status = decode(memory.data_ptr(), memory.numel(), row, row + 1, place + i * size, self.cols)
            c.check(status, f"row {row} of a matrix with {self.rows}")
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return self  # nothing in it ever changes


def pack_linear(
    spec: dict[str, Any],
    tensors: dict[str, Tensor],
    bias: Tensor | None = None,
    layout: str = "auto",
    *,
    segment: int = 0,
    threads: int | None = None,
) -> PackedLinear:
    """Pack a stored code of any kind.

    Parameters
    ----------
    spec : the code's spec, with `shape`.
    tensors : its stored tensors.
    bias : [out], any float dtype.
    layout : "auto", or a name in `source.LAYOUTS` for the operand of a code that is one.
    segment : columns with one scale of the quantised input; 0 for the library's choice.

    Raises
    ------
    ValueError
        the code is damaged, or it has no such layout.
    FeatherError
        there is no native library.
    """
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return pack_code(code_from(spec, stored), bias, layout, segment=segment, threads=threads)


def pack_code(
    code: Code, bias: Tensor | None = None, layout: str = "auto", *, segment: int = 0, threads: int | None = None
) -> PackedLinear:
    """`pack_linear` of a code in memory."""
    packer = _Packer(layout, segment, threads)
    steps: tuple[Step, ...] = ()
    if isinstance(code, QuantizedInput):  # only the outermost one rounds
        steps, code = (Step("round", block=code.group_size, bits=code.bits),), code.inner
    terms = packer.terms(code, steps)
    return PackedLinear(code.shape, terms, bias, "; ".join(dict.fromkeys(packer.notes)))


def pack_dense(
    weight: Tensor, bias: Tensor | None = None, *, segment: int = 0, threads: int | None = None
) -> PackedLinear:
    """Pack a matrix [out, in] of any float dtype; float32 that fits a 16-bit type exactly is stored in it."""
    terms = (Term((), _Packer("auto", segment, threads).dense(weight)),)
    return PackedLinear((weight.shape[0], weight.shape[1]), terms, bias)


def narrowed(weight: Tensor) -> Tensor:
    """The matrix in bfloat16 or float16 where that changes nothing, else in float32."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        return weight
    weight = weight.float()
    for dtype in (torch.bfloat16, torch.float16):
        short = weight.to(dtype)
        if torch.equal(short.float(), weight):
            return short
    return weight


class _Packer:
    """Packs the parts of one code, and notes what it had to decode."""

    def __init__(self, layout: str, segment: int, threads: int | None) -> None:
        if layout not in c.LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {', '.join(c.LAYOUTS)}")
        self.layout, self.segment, self.threads = layout, segment, threads
        self.native = c.needed()
        self.notes: list[str] = []

    def terms(self, code: Code, steps: tuple[Step, ...]) -> tuple[Term, ...]:
        """The terms of a code whose input went through `steps`."""
        if isinstance(code, Sum) and any(isinstance(part, SignFactor) for part in code.terms):
            return (Term(steps, self._decoded(code, "a stack of signs and factors has no layout of its own")),)
        if isinstance(code, Sum):
            return tuple(term for part in code.terms for term in self.terms(part, steps))
        if isinstance(code, QuantizedInput):
            return self.terms(code.inner, steps)
        if isinstance(code, Permuted):
            return self.terms(code.inner, (*steps, Step("permute", code.order.to(torch.int32).contiguous())))
        if isinstance(code, ColumnScaled):
            return self.terms(code.inner, (*steps, Step("scale", code.column_scales.float().contiguous())))
        if isinstance(code, Hadamard):
            signs = random_signs(code.seed, code.shape[1]).float()
            return self.terms(code.inner, (*steps, Step("hadamard", signs, block=code.block)))
        if isinstance(code, Masked):
            code = code.in_rows()
        if isinstance(code, Sparse):
            columns, values = code.columns.to(torch.int32).contiguous(), code.values.float().contiguous()
            return (Term(steps, row_pointers=code.row_pointers.contiguous(), columns=columns, values=values),)
        if isinstance(code, LowRank):
            left, right = self._factor(code.left, code.left_scales), self._factor(code.right, code.right_scales)
            return (Term(steps, left, right),)
        if isinstance(code, Product):
            return self._product(code, steps)
        if isinstance(code, OffsetTrits):
            return self._offset_trits(code, steps)
        if isinstance(code, BinaryPlanes) and code.group_size >= NARROWEST_BINARY_GROUP:
            return tuple(Term(steps, self._own(part)) for part in _binary_as_trits(code))
        return (Term(steps, self._own(code)),)

    def _own(self, code: Code) -> Operand:
        """The operand of a code that is a single matrix, decoded where it has no layout of its own."""
        fill = FILL.get(type(code))
        if fill is None:
            return self._decoded(code, f"{code.kind} has no layout of its own")
        if isinstance(code, Uniform) and code.axis != "input":
            return self._decoded(code, "uniform with groups of rows has no layout of its own")
        struct, keep = fill(code)
        operand = self._pack(struct, code.kind, self.layout)
        del keep
        if operand is None and self.layout != "auto":
            raise ValueError(f"a {code.kind} code like this has no layout {self.layout!r}")
        return operand or self._decoded(code, f"{code.kind} with these settings has no layout")

    def _decoded(self, code: Code, note: str) -> Operand:
        self.notes.append(f"{note}: decoded to a dense matrix")
        return self.dense(code.decode())

    def dense(self, weight: Tensor) -> Operand:
        struct, keep = dense(Dense(narrowed(weight.detach().cpu())))
        operand = self._pack(struct, "dense", "auto")
        del keep
        if operand is None:
            raise ValueError(f"the native library refused a dense matrix {list(weight.shape)}")
        return operand

    def _factor(self, factor: Tensor, scales: Tensor | None) -> Operand:
        if scales is None:
            return self.dense(factor)
        codes = (factor.to(torch.int16) + 128).to(torch.uint8).reshape(-1)
        code = Uniform(codes, scales.unsqueeze(1), None, (len(factor), factor.shape[1]), 8, factor.shape[1])
        return self._auto()._own(code)

    def _product(self, code: Product, steps: tuple[Step, ...]) -> tuple[Term, ...]:
        """W x = A (B x), steps being those before B."""
        left, right = self._auto().terms(code.left, ()), self._auto().terms(code.right, steps)
        single = all(term.kind == "operand" for term in left + right) and not any(term.steps for term in left)
        if single and len(left) * len(right) <= MOST_PAIRS:
            return tuple(Term(b.steps, a.operand, b.operand) for a in left for b in right)
        layers = PackedLinear(code.left.shape, left, None), PackedLinear(code.right.shape, right, None)
        return (Term((), layers=layers),)

    def _offset_trits(self, code: OffsetTrits, steps: tuple[Step, ...]) -> tuple[Term, ...]:
        """W = a t + m: a plane of trits, and m [out, groups] times the matrix that sums the columns of each group."""
        columns, groups = code.shape[1], code.offsets.shape[1]
        plane = TritPlanes(
            code.trits.unsqueeze(0), code.scales.unsqueeze(-1), code.shape, code.group_size, packing=code.packing
        )
        member = torch.arange(groups).unsqueeze(1) == torch.arange(columns) // code.group_size
        packed = pack_trits(member.to(torch.int8), "2bit").unsqueeze(0)
        sums = TritPlanes(
            packed, torch.ones(groups, 1, 1, dtype=torch.float32), (groups, columns), columns, packing="2bit"
        )
        return Term(steps, self._own(plane)), Term(steps, self.dense(code.offsets), self._auto()._own(sums))

    def _auto(self) -> _Packer:
        """For parts whose layout is not the caller's choice."""
        other = _Packer("auto", self.segment, self.threads)
        other.notes = self.notes
        return other

    def _pack(self, struct: c.CodeStruct, kind: str, layout: str) -> Operand | None:
        """None where the source has no such layout. ValueError for codes that mean nothing."""
        struct.segment = self.segment
        place, number = ctypes.addressof(struct), c.LAYOUTS[layout]
        count = self.native.operand_bytes(place, number)
        if count < 0:
            return None
        memory, bad = c.aligned(count), ctypes.c_int64(-1)
        status = self.native.operand_pack(
            place, number, memory.data_ptr(), count, c.threads_of(self.threads), ctypes.addressof(bad)
        )
        if bad.value >= 0:
            raise ValueError(f"byte {bad.value} of the codes of a {kind} matrix is not valid")
        c.check(status, f"a {kind} matrix")
        return Operand(memory, kind)


def _binary_as_trits(code: BinaryPlanes) -> list[TritPlanes]:
    """Planes of signs as trit-planes that happen to have no zeros, at most three to an operand."""
    signs = code.unpack()
    strip = torch.arange(code.shape[0]) // (code.rows_per_scale or code.shape[0])
    scales = code.scale_values() if code.shifts is not None else code.scales
    assert scales is not None
    dtype = scales.dtype if scales.dtype in DTYPES else torch.float32
    return [
        TritPlanes.encode(signs[k : k + 3], scales[strip][:, :, k : k + 3], code.group_size, scale_dtype=dtype)
        for k in range(0, code.planes, 3)
    ]
