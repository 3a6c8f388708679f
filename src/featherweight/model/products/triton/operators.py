"""`linear` and `matmul`: the operators on top of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from featherweight.model.products.triton import launch
from featherweight.model.products.triton.epilogue import epilogue_kernel
from featherweight.model.products.triton.operand import (
    DENSE,
    LOW_RANK,
    SLICE,
    SPARSE,
    GpuOperand,
)
from featherweight.model.products.triton.packed import product
from featherweight.model.products.triton.steps import stepped

Precision = Literal["float", "int8"]


def matmul(x: Tensor, operand: GpuOperand, precision: Precision = "float") -> Tensor:
    """x W^T for one operand: see `linear`."""
    return linear(x, [operand], None, precision)


def linear(
    x: Tensor, operands: Sequence[GpuOperand], bias: Tensor | None = None, precision: Precision = "float"
) -> Tensor:
    """x W^T + bias, W being the sum of the operands.

    Parameters
    ----------
    x : [..., in] float16, bfloat16 or float32, on the operands' device.
    operands : terms of W (`pack_terms`), of one shape; at least one.
    bias : [out] or None.
    precision : "float": activations as they are, sums in float32. "int8": activations rounded to 8 bits per token
        and group where the operand has such a path (`GpuOperand.int8_ready`); other terms stay "float".

    Returns
    -------
    [..., out] in the dtype of x.

    Raises
    ------
    ValueError
        shapes, dtypes or devices do not fit.
    """
    _check(x, operands, bias, precision)
    rows, cols = operands[0].shape
    inputs = x.reshape(-1, cols)
    # Kernels reach the fourth token by 32-bit offsets.
    inputs = inputs if inputs.stride(-1) == 1 and inputs.stride(0) < 1 << 29 else inputs.contiguous()
    out = torch.empty(inputs.shape[0], rows, dtype=x.dtype, device=x.device)
    if out.numel():
        _apply(inputs, operands, bias, precision, out)
    return out.view(*x.shape[:-1], rows)


def _check(x: Tensor, operands: Sequence[GpuOperand], bias: Tensor | None, precision: str) -> None:
    if not operands or any(operand.shape != operands[0].shape for operand in operands):
        raise ValueError(f"operands must be one or more of one shape, not {[list(o.shape) for o in operands]}")
    rows, cols = operands[0].shape
    if x.shape[-1:] != (cols,) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected float16, bfloat16 or float32 [..., {cols}]")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias is {list(bias.shape)}, expected [{rows}]")
    if precision not in ("float", "int8"):
        raise ValueError(f"precision must be 'float' or 'int8', not {precision!r}")
    for device in (*(operand.device for operand in operands), *(() if bias is None else (bias.device,))):
        if device != x.device:
            raise ValueError(f"x is on {x.device} and an operand or the bias on {device}; move them to one device")


def _apply(x: Tensor, operands: Sequence[GpuOperand], bias: Tensor | None, precision: Precision, out: Tensor) -> None:
    if len(operands) == 1 and operands[0].scheme == DENSE:
        out.copy_(_dense(stepped(x, operands[0].steps), operands[0].tensors["weight"], bias))
        return
    if len(operands) == 1 and operands[0].packed:
        partials = product(x, operands[0], precision, bias, out)
        if partials is None:  # written to `out`
            return
        _finish([partials], bias, None, None, out)
        return
    partials_of, low_rank, sparse = [], [], []
    for operand in operands:
        if operand.scheme == LOW_RANK:
            low_rank.append((operand, stepped(x, operand.steps)))
        elif operand.scheme == SPARSE:
            sparse.append((operand, stepped(x, operand.steps)))
        elif operand.scheme == DENSE:
            partials_of.append(_dense(stepped(x, operand.steps), operand.tensors["weight"], None).float().unsqueeze(0))
        else:
            partials = product(x, operand, precision, None, None)
            assert partials is not None
            partials_of.append(partials)
    # A layer has one low-rank and one sparse term as a rule; more take further passes, through float32.
    for _ in range(max(len(low_rank), len(sparse)) - 1):
        total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        _finish(partials_of, None, _pop(low_rank, 1), _pop(sparse, 1), total)
        partials_of = [total.unsqueeze(0)]
    _finish(partials_of, bias, _pop(low_rank, 0), _pop(sparse, 0), out)


Term = tuple[GpuOperand, Tensor]


def _pop(terms: list[Term], keep: int) -> Term | None:
    return terms.pop() if len(terms) > keep else None


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's product, in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _finish(
    partials: list[Tensor], bias: Tensor | None, low_rank: Term | None, sparse: Term | None, out: Tensor
) -> None:
    """`out` = sum of partial results + terms + bias."""
    tokens, rows = out.shape
    joined = partials[0] if len(partials) == 1 else torch.cat(partials or [out.new_zeros(0, *out.shape)]).float()
    empty = out  # stands for tensors that the kernel does not read
    left, u, rank = empty, empty, 0
    if low_rank is not None:
        operand, x = low_rank
        left = operand.tensors["left"]
        u = (x.float() @ operand.tensors["right"].float().t()).contiguous()
        rank = left.shape[0]
    starts, columns, values, inputs = empty, empty, empty, empty
    if sparse is not None:
        operand, inputs = sparse
        starts, columns, values = (operand.tensors[name] for name in ("starts", "columns", "values"))
    tile = min(16, launch.power_above(tokens))
    with launch.on_device(out):
        epilogue_kernel[(-(-rows // SLICE), -(-tokens // tile))](
            joined,
            empty if bias is None else bias,
            left,
            u,
            starts,
            columns,
            values,
            inputs,
            out,
            len(joined),
            tokens,
            rows,
            joined.stride(0),
            inputs.stride(0),
            rank,
            HAS_BIAS=bias is not None,
            HAS_LOW_RANK=low_rank is not None,
            HAS_SPARSE=sparse is not None,
            TOKENS=tile,
            SLICE=SLICE,
            num_warps=1 if tile < 4 else 4,
        )
