"""`linear` and `matmul`: the operators on top of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.model.products.triton import activations, launch
from featherweight.model.products.triton.epilogue import epilogue_kernel
from featherweight.model.products.triton.group_tiles import group_tiles_kernel
from featherweight.model.products.triton.launch import Config
from featherweight.model.products.triton.matvec import matvec_int8_kernel, matvec_kernel
from featherweight.model.products.triton.operand import (
    DENSE,
    FIELDS,
    LOW_RANK,
    SLICE,
    SPARSE,
    TABLE,
    GpuOperand,
    Layout,
    Step,
)
from featherweight.model.products.triton.tiles import tiles_kernel

Precision = Literal["float", "int8"]

MATVEC_TOKENS = 4
"""Up to this many tokens the lanes multiply; beyond, tensor cores, whose tiles have at least 16."""


def matmul(x: Tensor, operand: GpuOperand, precision: Precision = "float") -> Tensor:
    """x W^T for one operand: see `linear`."""
    return linear(x, [operand], None, precision)


def linear(
    x: Tensor, operands: Sequence[GpuOperand], bias: Tensor | None = None, precision: Precision = "float"
) -> Tensor:
    """x W^T + bias, W being the sum of the operands.

    Args:
        x: [..., in] float16, bfloat16 or float32, on the operands' device.
        operands: terms of W (`pack_terms`), of one shape; at least one.
        bias: [out] or None.
        precision: "float": activations as they are, sums in float32. "int8": activations rounded to 8 bits per token
            and group where the operand has such a path (`GpuOperand.int8_ready`); other terms stay "float".

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
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
        out.copy_(_dense(_stepped(x, operands[0].steps), operands[0].tensors["weight"], bias))
        return
    if len(operands) == 1 and operands[0].packed:
        partials = _product(x, operands[0], precision, bias, out)
        if partials is None:  # written to `out`
            return
        _finish([partials], bias, None, None, out)
        return
    partials_of, low_rank, sparse = [], [], []
    for operand in operands:
        if operand.scheme == LOW_RANK:
            low_rank.append((operand, _stepped(x, operand.steps)))
        elif operand.scheme == SPARSE:
            sparse.append((operand, _stepped(x, operand.steps)))
        elif operand.scheme == DENSE:
            partials_of.append(_dense(_stepped(x, operand.steps), operand.tensors["weight"], None).float().unsqueeze(0))
        else:
            partials = _product(x, operand, precision, None, None)
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


def _stepped(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """x after the steps on the way to an operand, in its dtype."""
    for step in steps:
        if step.kind == "permute":
            x = x.index_select(1, _tensor(step))
        elif step.kind == "scale":
            x = (x * _tensor(step)).to(x.dtype)
        elif step.kind == "hadamard":
            x = activations.hadamard(x, _tensor(step), step.block)
        else:
            x = _round(x, step.block, step.bits)
    return x


def _tensor(step: Step) -> Tensor:
    assert step.tensor is not None
    return step.tensor


def _round(x: Tensor, group_size: int, bits: int) -> Tensor:
    """The rounding of `quantized-input` (docs/format.md)."""
    top = (1 << (bits - 1)) - 1
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group_size)).view(len(x), -1, group_size)
    step = (padded.abs().amax(-1, keepdim=True) / top).clamp(1e-5, 1e4).half().float()
    rounded = (padded / step).round().clamp(-top - 1, top) * step
    return rounded.view(len(x), -1)[:, : x.shape[1]].to(x.dtype)


# --- launches -------------------------------------------------------------------------------------------------------


def _product(x: Tensor, operand: GpuOperand, precision: str, bias: Tensor | None, out: Tensor | None) -> Tensor | None:
    """Partial results float32 [splits, tokens, rows]; None where there is one split, written to `out` with bias."""
    layout = operand.layout
    assert layout is not None
    if precision == "int8" and operand.int8_ready:
        return int8_product(*_rounded(x, operand.steps, layout.group_size), operand, bias, out)
    x = _stepped(x, operand.steps)
    if launch.interpreted() and x.dtype == torch.bfloat16:
        x = x.float()  # `tl.dot` of Triton's interpreter takes the bits of bfloat16 for integers
    if len(x) > MATVEC_TOKENS and _tile_elements(layout, operand, 16):
        return _tuned("group tiles", x, operand, lambda config: _group_tiles(x, None, operand, bias, out, config))
    name = "matvec" if len(x) <= MATVEC_TOKENS else "tiles"
    return _tuned(name, x, operand, lambda config: _float(name, x, operand, bias, out, config))


def int8_product(
    x: Tensor, x_scales: Tensor, x_sums: Tensor, operand: GpuOperand, bias: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Product of int8 activations [tokens, in] with scales and sums [tokens, groups] (`activations.quantize`).

    Returns float32 [splits, tokens, out] to be added up; None where there is one split, then written to `out` with
    the bias.
    """
    if _faces_quads(operand) and len(x) <= MATVEC_TOKENS:
        return _tuned("matvec int8", x, operand, lambda config: _matvec_int8(x, x_scales, operand, bias, out, config))
    rounding = x_scales, x_sums
    return _tuned("int8", x, operand, lambda config: _group_tiles(x, rounding, operand, bias, out, config))


def _tuned(name: str, x: Tensor, operand: GpuOperand, run: Callable[[Config], Tensor | None]) -> Tensor | None:
    """`run` with the configuration that is fastest for this kind of operand, shape and number of tokens."""
    tokens = min(launch.power_above(len(x)), 1024)
    key = (name, tokens, x.dtype, x.device, operand.shape, operand.scheme, operand.layout, tuple(operand.tensors))
    return run(launch.fastest(key, launch.candidates(name, len(x)), run, x.device))


CHUNK_WEIGHTS = {"float": 32, "int8": 128}
"""Weights of a chunk of `matvec` at most: what is spelled out, and the loads that are under way, grow with it, and in
floating point so does what is lost when the constant part of x f is taken off (`decode`)."""


def _float(
    name: str, x: Tensor, operand: GpuOperand, bias: Tensor | None, out: Tensor | None, config: Config
) -> Tensor | None:
    """The kernels of `matvec` and `tiles`, which take every layout."""
    layout, tensors, tokens = operand.layout, operand.tensors, len(x)
    assert layout is not None
    tile = config.tokens or launch.power_above(tokens)
    block_n = launch.divisor(config.block_n, operand.padded_rows)
    token_blocks, row_blocks = -(-tokens // tile), -(-operand.shape[0] // block_n)
    if name == "matvec":
        chunk = launch.fitted(
            max(1, CHUNK_WEIGHTS["float"] * config.halves // (2 * layout.positions)), layout.group_elements
        )
        chunks = layout.groups * -(-layout.group_elements // chunk)
        blocks = -(-chunks // config.block_e)
        shape = {"LANES": config.block_e, "CHUNK": chunk}
        counts: tuple[int, ...] = (layout.elements, chunks, blocks)
        splits, per_split = launch.splits_for(row_blocks, blocks, x.device, waves=1)
    else:
        blocks = -(-layout.elements // config.block_e)
        shape = {"BLOCK_E": config.block_e}
        counts = (layout.elements, blocks)
        splits, per_split = launch.splits_for(token_blocks * row_blocks, blocks, x.device)
    target, direct = _target(splits, tokens, operand, out, x.device)
    grid = (row_blocks, splits) if name == "matvec" else (token_blocks, row_blocks, splits)
    kernel = matvec_kernel if name == "matvec" else tiles_kernel
    codes = tensors["codes"]
    with launch.on_device(x):
        kernel[grid](
            x,
            codes,
            tensors["tables"] if operand.scheme == TABLE else tensors["scales"],
            tensors.get("zeros", codes),
            tensors.get("signs", codes),
            bias if direct and bias is not None else codes,
            target,
            tokens,
            *operand.shape,
            x.stride(0),
            operand.padded_rows,
            *counts,
            per_split,
            float(layout.exponent or 0),
            **_constants(operand, layout),
            **shape,
            HAS_BIAS=direct and bias is not None,
            TOKENS=tile,
            BLOCK_N=block_n,
            WIDE=launch.wide(tensors.values()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return None if direct else target


def _faces_quads(operand: GpuOperand) -> bool:
    """Whether `matvec_int8_kernel` takes it: whole groups, so that four activations always fill a word."""
    layout = operand.layout
    return layout is not None and layout.quads and layout.groups * layout.group_size == operand.shape[1]


def _matvec_int8(
    x: Tensor, x_scales: Tensor, operand: GpuOperand, bias: Tensor | None, out: Tensor | None, config: Config
) -> Tensor | None:
    layout, tokens = operand.layout, len(x)
    assert layout is not None
    block_n = launch.divisor(config.block_n, operand.padded_rows)
    most = max(1, CHUNK_WEIGHTS["int8"] * config.halves // (2 * layout.positions))
    chunk = launch.divisor(launch.power_above(most), layout.group_elements)
    run = launch.divisor(launch.power_above(most // chunk), layout.groups) if chunk == layout.group_elements else 1
    chunks = layout.groups // run * (layout.group_elements // chunk)
    blocks, row_blocks = -(-chunks // config.block_e), -(-operand.shape[0] // block_n)
    splits, per_split = launch.splits_for(row_blocks, blocks, x.device, waves=1)
    target, direct = _target(splits, tokens, operand, out, x.device)
    codes = operand.tensors["codes"]
    words = x.view(torch.int32)
    with launch.on_device(x):
        matvec_int8_kernel[(row_blocks, splits)](
            words,
            x_scales,
            codes,
            operand.tensors["scales"],
            operand.tensors.get("zeros", codes),
            bias if direct and bias is not None else codes,
            target,
            tokens,
            operand.shape[0],
            words.stride(0),
            operand.padded_rows,
            layout.groups,
            chunks,
            blocks,
            per_split,
            float(layout.exponent or 0),
            BITS=layout.bits,
            GROUP_ELEMENTS=layout.group_elements,
            PLANES=layout.planes,
            ZERO=layout.zero,
            HAS_ZEROS="zeros" in operand.tensors,
            LOG8=layout.exponent is not None,
            HAS_BIAS=direct and bias is not None,
            PTX=launch.has_ptx(),
            TOKENS=launch.power_above(tokens),
            BLOCK_N=block_n,
            LANES=config.block_e,
            CHUNK=chunk,
            RUN=run,
            WIDE=launch.wide(operand.tensors.values()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return None if direct else target


def _constants(operand: GpuOperand, layout: Layout) -> dict[str, Any]:
    """What both floating-point kernels are specialised for."""
    weights = (*layout.weights, 1, 1, 1)
    return {
        "SCHEME": operand.scheme,
        "BITS": layout.bits,
        "WORDS": layout.words,
        "POSITIONS": layout.positions,
        "GROUP": layout.group_size,
        "GROUP_ELEMENTS": layout.group_elements,
        "GROUPS": layout.groups,
        "PLANES": layout.planes,
        "ZERO": layout.zero,
        "TIED": bool(layout.weights),
        "WEIGHT0": weights[0],
        "WEIGHT1": weights[1],
        "WEIGHT2": weights[2],
        "QUADS": layout.quads,
        "LANE_STRIDE": layout.lane_stride,
        "HAS_ZEROS": "zeros" in operand.tensors,
        "HAS_SIGNS": "signs" in operand.tensors,
        "LOG8": layout.exponent is not None,
        "EVEN": layout.even and operand.shape[1] % layout.group_size == 0,
    }


def _tile_elements(layout: Layout, operand: GpuOperand, least: int) -> int:
    """Elements of a tile of `group_tiles`, a power of two that divides a group's; 0 where tiles have under `least`."""
    if operand.scheme != FIELDS or layout.words != 1:
        return 0
    block_e = launch.divisor(max(1, 128 // layout.positions), layout.group_elements)
    return block_e if layout.positions * block_e >= least else 0


def _group_tiles(
    x: Tensor,
    rounding: tuple[Tensor, Tensor] | None,
    operand: GpuOperand,
    bias: Tensor | None,
    out: Tensor | None,
    config: Config,
) -> Tensor | None:
    layout, tokens = operand.layout, len(x)
    assert layout is not None
    block_n, block_e = launch.divisor(config.block_n, operand.padded_rows), _tile_elements(layout, operand, 16)
    blocks = layout.elements // block_e
    token_blocks, row_blocks = -(-tokens // config.tokens), -(-operand.shape[0] // block_n)
    splits, per_split = launch.splits_for(token_blocks * row_blocks, blocks, x.device)
    target, direct = _target(splits, tokens, operand, out, x.device)
    codes = operand.tensors["codes"]
    with launch.on_device(x):
        group_tiles_kernel[(token_blocks, row_blocks, splits)](
            x,
            *(rounding or (codes, codes)),
            codes,
            operand.tensors["scales"],
            operand.tensors.get("zeros", codes),
            bias if direct and bias is not None else codes,
            target,
            tokens,
            *operand.shape,
            x.stride(0),
            operand.padded_rows,
            layout.groups,
            blocks,
            per_split,
            float(layout.exponent or 0),
            BITS=layout.bits,
            POSITIONS=layout.positions,
            GROUP=layout.group_size,
            GROUP_ELEMENTS=layout.group_elements,
            PLANES=layout.planes,
            ZERO=layout.zero,
            HAS_ZEROS="zeros" in operand.tensors,
            LOG8=layout.exponent is not None,
            EVEN=layout.even and operand.shape[1] % layout.group_size == 0,
            HAS_BIAS=direct and bias is not None,
            INT8=rounding is not None,
            TOKENS=config.tokens,
            BLOCK_N=block_n,
            BLOCK_E=block_e,
            WIDE=launch.wide(operand.tensors.values()),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return None if direct else target


def _rounded(x: Tensor, steps: Sequence[Step], group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps, the last of them fused with rounding where it is a rotation."""
    if steps and steps[-1].kind == "hadamard":
        return activations.quantize(_stepped(x, steps[:-1]), group_size, _tensor(steps[-1]), steps[-1].block)
    return activations.quantize(_stepped(x, steps), group_size)


def _target(
    splits: int, tokens: int, operand: GpuOperand, out: Tensor | None, device: torch.device
) -> tuple[Tensor, bool]:
    """Where a kernel writes, and whether that is the result."""
    if splits == 1 and out is not None:
        return out, True
    return torch.empty(splits, tokens, operand.shape[0], dtype=torch.float32, device=device), False


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
