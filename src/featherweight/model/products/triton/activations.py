"""Inputs before the product: block rotation and rounding to 8 bits, fused.

Rounding, per token and `group_size` columns: scale = max |x| / 127, code = x / scale to the nearest integer, halves to
even; the sums of the codes serve operands with zero points. A group of zeros has scale 0; one with a NaN or infinity
has scale NaN and codes 0. The CPU's fw_quantize multiplies with 127 / max |x| instead: codes may differ by one at ties.

Rotation: butterflies at distances 1, 2, 4, ... in float32, then, for orders that are no power of two, the dense factor
in the order of its columns, then the rounded 1 / sqrt(block): the order of sums of `codes.hadamard`. Nothing is fused.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from featherweight.model.products.triton.launch import on_device, power_above
from featherweight.storage.codes.orthogonal import dense_factor, divides, kernel_order, refusal

SPAN = 1024
"""Columns a program rounds at least, where groups allow it."""


@triton.jit
def _rounded(v, used, SEGMENTS: tl.constexpr, SIZE: tl.constexpr):
    """Segments [SEGMENTS, SIZE]: codes, scales and sums of codes."""
    magnitude = tl.where(used, tl.abs(v), 0.0)
    # Compared, not computed with: a maximum may drop NaN, and x - x may be fused with the product that x came from.
    bad = tl.sum((used & ~(magnitude < float("inf"))).to(tl.int32), 1) > 0
    scale = tl.div_rn(tl.max(magnitude, 1), tl.full((SEGMENTS,), 127.0, tl.float32))
    scale = tl.where(bad, float("nan"), scale)
    usable = scale > 0
    divisor = tl.where(usable, scale, 1.0)
    ratio = tl.div_rn(v, tl.broadcast_to(divisor[:, None], (SEGMENTS, SIZE)))
    # Adding and subtracting 1.5 2^23 rounds to the nearest integer, halves to even.
    whole = (ratio + 12582912.0) - 12582912.0
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)  # a subnormal scale loses bits, and the ratio passes 127
    codes = tl.where(used & usable[:, None], whole, 0.0).to(tl.int32)
    return codes, scale, tl.sum(codes, 1)


@triton.jit
def quantize_kernel(
    x, codes, scales, sums, cols, x_stride, groups, GROUP: tl.constexpr, SEGMENTS: tl.constexpr, SIZE: tl.constexpr
):
    t = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    inside = tl.arange(0, SIZE)
    column = segment[:, None] * GROUP + inside[None, :]
    used = (inside < GROUP)[None, :] & (column < cols)
    v = tl.load(x + t * x_stride + column, mask=used, other=0.0).to(tl.float32)
    q, scale, sum = _rounded(v, used, SEGMENTS, SIZE)
    tl.store(codes + t * cols + column, q.to(tl.int8), mask=used)
    tl.store(scales + t * groups + segment, scale, mask=segment < groups)
    tl.store(sums + t * groups + segment, sum, mask=segment < groups)


@triton.jit
def hadamard_kernel(
    x,
    signs,  # int8 [cols]
    factors,  # float32 [DENSE, DENSE], or anything for 1
    rotated,  # [tokens, cols], or anything where rounded
    codes,
    scales,
    sums,
    root,  # 1 / sqrt(block)
    cols,
    x_stride,
    groups,
    LENGTH: tl.constexpr,  # of a Sylvester matrix, 2^STAGES
    STAGES: tl.constexpr,
    DENSE: tl.constexpr,  # the order of the dense factor, or 1
    RUNS: tl.constexpr,  # a power of two: runs of LENGTH columns that a program has, some of them padding
    USED: tl.constexpr,  # runs of them that are columns
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64)
    run = tl.arange(0, RUNS)
    column = (tl.program_id(0) * USED + run)[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    used = (run < USED)[:, None] & (column < cols)
    v = tl.load(x + t * x_stride + column, mask=used, other=0.0).to(tl.float32)
    v = v * tl.load(signs + column, mask=used, other=1).to(tl.float32)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(v, (RUNS * LENGTH // (2 << stage), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (RUNS, LENGTH))
    if DENSE > 1:
        mixed = tl.zeros((RUNS, LENGTH), tl.float32)
        for j in range(DENSE):
            source = tl.sum(tl.where((run == j)[:, None], v, 0.0), 0)
            factor = tl.load(factors + run * DENSE + j, mask=run < DENSE, other=0.0)
            mixed += factor[:, None] * source[None, :]
        v = mixed
    v = v * root
    if ROUND:
        SEGMENTS: tl.constexpr = RUNS * LENGTH // GROUP
        flat = tl.reshape(v, (SEGMENTS, GROUP))
        segment = tl.program_id(0) * (USED * LENGTH // GROUP) + tl.arange(0, SEGMENTS)
        place = tl.program_id(0) * (USED * LENGTH) + tl.arange(0, SEGMENTS)[:, None] * GROUP + tl.arange(0, GROUP)
        here = (tl.arange(0, SEGMENTS) < USED * LENGTH // GROUP) & (segment < groups)
        mask = here[:, None] & (place < cols)
        q, scale, sum = _rounded(flat, mask, SEGMENTS, GROUP)
        tl.store(codes + t * cols + place, q.to(tl.int8), mask=mask)
        tl.store(scales + t * groups + segment, scale, mask=here)
        tl.store(sums + t * groups + segment, sum, mask=here)
    else:
        tl.store(rotated + t * cols + column, v.to(rotated.dtype.element_ty), mask=used)


def hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """T x of `codes.hadamard`, computed in float32: x [tokens, cols] of any float dtype, signs int8 [cols]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_hadamard(x, signs, block, (out, out, out, out))
    return out


def quantize(x: Tensor, group_size: int, signs: Tensor | None = None, block: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [tokens, cols], scales float32 and sums int32 [tokens, groups] of x [tokens, cols].

    With `signs` and `block` x is rotated first, in the same kernel where groups lie within blocks or blocks within
    groups, in float32 through memory elsewhere.
    """
    tokens, cols = x.shape
    groups = -(-cols // group_size)
    codes = torch.empty(tokens, cols, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, groups, dtype=torch.int32, device=x.device)
    if signs is not None:
        if fuses(block, group_size):
            _launch_hadamard(x, signs, block, (codes, codes, scales, sums), group_size)
            return codes, scales, sums
        x = hadamard(x.float(), signs, block)
    size = power_above(group_size)
    segments = max(1, SPAN // size)
    grid = (-(-groups // segments), tokens)
    with on_device(x):
        quantize_kernel[grid](x, codes, scales, sums, cols, x.stride(0), groups, group_size, segments, size)
    return codes, scales, sums


def fuses(block: int, group_size: int) -> bool:
    """Whether rotation and rounding are one kernel: groups of 2^p columns that divide, or are made of, blocks' runs."""
    dense = kernel_order(block) or 1
    return group_size & (group_size - 1) == 0 and (group_size <= block // dense or dense == 1)


def _launch_hadamard(
    x: Tensor,
    signs: Tensor,
    block: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    group: int = 0,
) -> None:
    """group : columns that are rounded together; 0 for none"""
    dense = kernel_order(block)
    if dense is None or not divides(block, x.shape[-1]):
        raise ValueError(refusal(block, x.shape[-1]))
    length = block // dense
    runs = power_above(dense) if dense > 1 else max(1, power_above(max(group, SPAN)) // length)
    used = dense if dense > 1 else runs
    matrix = dense_factor(dense).float().contiguous().to(x.device)
    grid = (-(-x.shape[1] // (used * length)), x.shape[0])
    with on_device(x):
        hadamard_kernel[grid](
            x,
            signs,
            matrix,
            *outputs,
            1 / math.sqrt(block),
            x.shape[1],
            x.stride(0),
            -(-x.shape[1] // group) if group else 0,
            LENGTH=length,
            STAGES=length.bit_length() - 1,
            DENSE=dense,
            RUNS=runs,
            USED=used,
            ROUND=group > 0,
            GROUP=max(group, 1),
            enable_fp_fusion=False,
        )
