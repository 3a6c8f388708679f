"""The operators of `torch.ops.featherweight`: one schema each, shape rules for tracing, and a kernel for each device.

    trit_planes_matmul, uniform_matmul, codebook_matmul, sherry_matmul, dense_matmul
        x [..., in], an operand of `pack` as uint8 [bytes], out_features, precision "float" or "int8" -> [..., out]
    low_rank_matmul    x [..., in] through the operands right [r, in] and left [out, r] -> [..., out]
    sparse_matmul      x [..., in] times compressed rows -> [..., out]
    hadamard           x [..., in], each `block` columns rotated after `signs` [in] -> [..., in]
    hadamard_quantize  the same, then rounded: codes int8 [..., in], scales float32 and sums int32 [..., segments]

Results have the dtype of x. On a CPU the native library computes, without it `reference`. Operands are those of the
CPU; layers on a GPU have others (`gpu`), and kernels for these on another device can be given to `register_kernels`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featherweight.model.products import reference
from featherweight.model.products import structs as c
from featherweight.model.products.checks import (
    check_hadamard,
    check_matmul,
    check_quantize,
    check_sparse,
    check_sparse_contents,
)
from featherweight.model.products.pack import PackedLinear, Step, Term

NAMESPACE = "featherweight"
MATMULS = {kind: kind.replace("-", "_") + "_matmul" for kind in c.KINDS}
"""Name of the operator for operands of each kind."""

SCHEMAS = {
    **dict.fromkeys(MATMULS.values(), "(Tensor x, Tensor operand, SymInt out_features, str precision) -> Tensor"),
    "low_rank_matmul": "(Tensor x, Tensor left, Tensor right, SymInt out_features, str precision) -> Tensor",
    "sparse_matmul": "(Tensor x, Tensor row_pointers, Tensor columns, Tensor values, SymInt out_features) -> Tensor",
    "hadamard": "(Tensor x, int block, Tensor? signs) -> Tensor",
    "hadamard_quantize": "(Tensor x, int block, Tensor? signs, int segment) -> (Tensor, Tensor, Tensor)",
}


def matmul(x: Tensor, operand: Tensor, out_features: int, precision: str) -> Tensor:
    """x [..., in] times the transposed matrix of an operand, on the CPU."""
    check_matmul(x, (operand,), out_features, precision)
    native = c.native()
    if native is None or not x.numel():
        return reference.matmul(x, operand, precision)
    operand = _aligned(operand)
    header = c.header_of(operand)
    c.check_operand(operand)
    if (x.shape[-1], out_features) != (header.cols, header.rows):
        raise ValueError(
            f"the input has {x.shape[-1]} columns and {out_features} outputs are asked for, "
            f"the operand is [{header.rows}, {header.cols}]"
        )
    inputs = _rows(x)
    out = torch.empty(len(inputs), out_features, dtype=torch.float32)
    status = native.product(
        operand.data_ptr(), operand.numel(), inputs.data_ptr(), inputs.numel(), len(inputs), inputs.shape[1],
        out.data_ptr(), out.numel(), out_features, c.PRECISIONS[precision], 0, c.threads_of(),
    )  # fmt: skip
    c.check(status, "a matrix product")
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor, out_features: int, precision: str) -> Tensor:
    """x [..., in] times the transposed product of two operands, on the CPU."""
    check_matmul(x, (left, right), out_features, precision)
    if c.native() is None:
        return reference.low_rank_matmul(x, left, right, precision)
    inner = matmul(x.float(), right, int(c.header_of(right).rows), precision)
    return matmul(inner, left, out_features, precision).to(x.dtype)


def sparse_matmul(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor, out_features: int) -> Tensor:
    """x [..., in] times the transposed sparse matrix, on the CPU."""
    check_sparse(x, row_pointers, columns, values, out_features)
    check_sparse_contents(row_pointers, columns, x.shape[-1])
    if c.native() is None or not columns.numel() or not x.numel():
        return reference.sparse_matmul(x, row_pointers, columns, values)
    pointers, places = (t.to(torch.int32).contiguous() for t in (row_pointers, columns))
    term = Term((), row_pointers=pointers, columns=places, values=values.float().contiguous())
    return PackedLinear((out_features, x.shape[-1]), (term,), None)(x)


def hadamard(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    """T x for x [..., in], on the CPU."""
    check_hadamard(x, block, signs)
    native = c.native()
    if native is None or not x.numel():
        return reference.hadamard(x, block, signs)
    return _apply_step(native, Step("hadamard", _signs(x, signs), block=block), x).to(x.dtype)


def hadamard_quantize(x: Tensor, block: int, signs: Tensor | None, segment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of T x (of x with `block` 1), on the CPU."""
    check_quantize(x, block, signs, segment)
    native = c.native()
    if native is None or not x.numel():
        return reference.quantize(reference.hadamard(x.float(), block, signs) if block > 1 else x, segment)
    inputs = _rows(x)
    tokens, cols = inputs.shape
    segments = -(-cols // segment)
    codes = torch.empty(tokens, cols, dtype=torch.int8)
    scales, sums = torch.empty(tokens, segments), torch.empty(tokens, segments, dtype=torch.int32)
    step = Step("hadamard", _signs(x, signs), block=block).struct() if block > 1 else None
    status = native.quantize(
        inputs.data_ptr(), tokens, cols, segment, None if step is None else ctypes.addressof(step),
        codes.data_ptr(), scales.data_ptr(), sums.data_ptr(), c.threads_of(),
    )  # fmt: skip
    c.check(status, "inputs to round")
    before = x.shape[:-1]
    return codes.view(x.shape), scales.view(*before, segments), sums.view(*before, segments)


CPU: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(MATMULS.values(), matmul),
    "low_rank_matmul": low_rank_matmul,
    "sparse_matmul": sparse_matmul,
    "hadamard": hadamard,
    "hadamard_quantize": hadamard_quantize,
}


def _shape_of_product(x: Tensor, operand: Tensor, out_features: int, precision: str) -> Tensor:
    check_matmul(x, (operand,), out_features, precision)
    return x.new_empty((*x.shape[:-1], out_features))


def _shape_of_low_rank(x: Tensor, left: Tensor, right: Tensor, out_features: int, precision: str) -> Tensor:
    check_matmul(x, (left, right), out_features, precision)
    return x.new_empty((*x.shape[:-1], out_features))


def _shape_of_sparse(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor, out_features: int) -> Tensor:
    check_sparse(x, row_pointers, columns, values, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _shape_of_codes(x: Tensor, block: int, signs: Tensor | None, segment: int) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize(x, block, signs, segment)
    grouped = (*x.shape[:-1], -(-x.shape[-1] // segment))
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(grouped, dtype=torch.float32), x.new_empty(grouped, dtype=torch.int32)


def _shape_of_input(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    check_hadamard(x, block, signs)
    return x.new_empty(x.shape)


FAKES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(MATMULS.values(), _shape_of_product),
    "low_rank_matmul": _shape_of_low_rank,
    "sparse_matmul": _shape_of_sparse,
    "hadamard": _shape_of_input,
    "hadamard_quantize": _shape_of_codes,
}


def register_kernels(device_type: str, kernels: dict[str, Callable[..., Any]]) -> None:
    """Make `kernels`, by operator name and with the arguments of the schema, those of a device type ("cuda")."""
    for name, kernel in kernels.items():
        torch.library.impl(f"{NAMESPACE}::{name}", device_type, kernel)


def _define() -> None:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES[name])
    register_kernels("cpu", CPU)


_define()


def apply_terms(x: Tensor, terms: tuple[Term, ...], bias: Tensor | None, out_features: int, precision: str) -> Tensor:
    """What `PackedLinear.__call__` computes, as operators on tensors: for tracing, and for other devices than the CPU.

    x [..., in] in any float dtype; the result [..., out] is float32.
    """
    total: Tensor | None = None
    for term in terms:
        part = _apply_term(x.float(), term, out_features, precision)
        total = part if total is None else total + part
    assert total is not None
    return total if bias is None else total + bias.to(total.device)


def _apply_term(x: Tensor, term: Term, out_features: int, precision: str) -> Tensor:
    for step in term.steps:
        x = _apply(step, x)
    ops = torch.ops.featherweight
    if term.layers:
        left, right = term.layers
        return apply_terms(
            apply_terms(x, right.terms, None, right.rows, precision), left.terms, None, left.rows, "float"
        )
    if term.operand is None:
        return ops.sparse_matmul(x, *(t.to(x.device) for t in term.sparse_tensors), out_features)  # type: ignore[no-any-return]
    memory = term.operand.memory.to(x.device)
    if term.right is not None:
        return ops.low_rank_matmul(x, memory, term.right.memory.to(x.device), out_features, precision)  # type: ignore[no-any-return]
    return getattr(ops, MATMULS[term.operand.kind])(x, memory, out_features, precision)  # type: ignore[no-any-return]


def _apply(step: Step, x: Tensor) -> Tensor:
    if step.kind == "round":
        return reference.rounded(x, step.bits, step.block)
    assert step.tensor is not None
    tensor = step.tensor.to(x.device)
    if step.kind == "permute":
        return x[..., tensor]
    if step.kind == "scale":
        return x * tensor
    return torch.ops.featherweight.hadamard(x, step.block, tensor)  # type: ignore[no-any-return]


def apply_step(step: Step, x: Tensor) -> Tensor:
    """One step on x [..., in] by the native library: float32 [..., in]."""
    return _apply_step(c.needed(), step, x)


def _apply_step(native: c.Native, step: Step, x: Tensor) -> Tensor:
    inputs, struct = _rows(x), step.struct()
    out = torch.empty_like(inputs)
    status = native.apply_step(
        ctypes.addressof(struct), inputs.data_ptr(), *inputs.shape, out.data_ptr(), c.threads_of()
    )
    c.check(status, f"a step of the kind {step.kind!r} on inputs {list(x.shape)}")
    return out.view(x.shape)


def _signs(x: Tensor, signs: Tensor | None) -> Tensor:
    return torch.ones(x.shape[-1], dtype=torch.float32) if signs is None else signs.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).reshape(-1, x.shape[-1]).contiguous()


def _aligned(operand: Tensor) -> Tensor:
    """The operand itself, or a copy at a multiple of 64 bytes: it may have come from a file or another device."""
    operand = operand.contiguous()
    if operand.data_ptr() % c.ALIGNMENT == 0:
        return operand
    return c.aligned(operand.numel()).copy_(operand)
