"""Products with packed operands: which kernel, with which configuration, in how many splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.model.products.triton import activations, launch
from featherweight.model.products.triton.group_tiles import group_tiles_kernel
from featherweight.model.products.triton.launch import Config
from featherweight.model.products.triton.matvec import matvec_int8_kernel, matvec_kernel
from featherweight.model.products.triton.operand import (
    FIELDS,
    TABLE,
    GpuOperand,
    Layout,
    Step,
)
from featherweight.model.products.triton.steps import stepped, tensor_of
from featherweight.model.products.triton.tiles import tiles_kernel

MATVEC_TOKENS = 4
"""Up to this many tokens the lanes multiply; beyond, tensor cores, whose tiles have at least 16."""


def product(x: Tensor, operand: GpuOperand, precision: str, bias: Tensor | None, out: Tensor | None) -> Tensor | None:
    """Partial results float32 [splits, tokens, rows]; None where there is one split, written to `out` with bias."""
    layout = operand.layout
    assert layout is not None
    if precision == "int8" and operand.int8_ready:
        return int8_product(*_rounded(x, operand.steps, layout.group_size), operand, bias, out)
    x = stepped(x, operand.steps)
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
        return activations.quantize(stepped(x, steps[:-1]), group_size, tensor_of(steps[-1]), steps[-1].block)
    return activations.quantize(stepped(x, steps), group_size)


def _target(
    splits: int, tokens: int, operand: GpuOperand, out: Tensor | None, device: torch.device
) -> tuple[Tensor, bool]:
    """Where a kernel writes, and whether that is the result."""
    if splits == 1 and out is not None:
        return out, True
    return torch.empty(splits, tokens, operand.shape[0], dtype=torch.float32, device=device), False
