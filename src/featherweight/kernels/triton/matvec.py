"""Products with one to four tokens: what decoding a text needs. The limit is reading the weights.

A program has `BLOCK_N` rows and one split of the elements; a lane has rows of its own and adds up in registers, lanes
and warps meet only once, at the end. Splits write partial results side by side, which `epilogue` adds in a fixed order:
no atomics, the result does not depend on scheduling.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from featherweight.kernels.triton.decode import TABLE, column_in_group, load_elements, load_scales, next_code


@triton.jit
def _multiplied(address, used, fraction, part, sum):
    """One position of one token: the sums of x f [elements, rows] and of x [elements], continued."""
    value = tl.load(address, mask=used, other=0.0).to(tl.float32)
    return tl.fma(tl.broadcast_to(value[:, None], fraction.shape), fraction, part), sum + value


@triton.jit
def _scaled(part, sum, factor, constant, total):
    """total + scale (sum of x (q - zero)) = total + factor (sum of x f) + constant (sum of x): see `decode`."""
    total = tl.fma(part, tl.broadcast_to(factor[None, :], part.shape), total)
    return total + sum[:, None] * constant[None, :]


@triton.jit
def matvec_kernel(
    x,  # [tokens, cols] float
    codes,  # [planes, elements, words, padded] int32, int16 or uint8
    scales,  # [planes or 1, groups, padded]; for tables the codebooks [groups, padded, 2^BITS]
    zeros,  # [groups, padded] uint8, or anything
    signs,  # [elements, padded] uint8, or anything
    bias,  # [rows], or anything
    out,  # [splits, tokens, rows]
    tokens,
    rows,
    cols,
    x_stride,
    padded,
    elements,
    blocks,
    blocks_per_split,
    exponent,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    TIED: tl.constexpr,
    WEIGHT0: tl.constexpr,
    WEIGHT1: tl.constexpr,
    WEIGHT2: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    LOG8: tl.constexpr,
    EVEN: tl.constexpr,  # groups are full of columns and elements full of weights: no masks
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # BLOCK_N divides `padded`: no masks along rows, and loads of 16 bytes a lane.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    BLOCKS_OF_GROUP: tl.constexpr = (GROUP_ELEMENTS + BLOCK_E - 1) // BLOCK_E
    # A sum for every row and element of the block: each is of one thread, so the loop has no reductions. Tokens are
    # spelled out, not a third dimension: all tensors then share the layout in which the weights are loaded.
    total0 = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        # A block lies in one group, and the division is one for all threads: scales are loaded once a row, and where
        # activations lie costs next to nothing to compute, so that each thread loads what it needs itself.
        group = block // BLOCKS_OF_GROUP
        inside = (block % BLOCKS_OF_GROUP) * BLOCK_E + tl.arange(0, BLOCK_E)
        real = tl.full((BLOCK_E,), True, tl.int1) if GROUP_ELEMENTS % BLOCK_E == 0 else inside < GROUP_ELEMENTS
        live = tl.broadcast_to(real[:, None], (BLOCK_E, BLOCK_N))
        e = group * GROUP_ELEMENTS + inside
        x0 = x + group * GROUP
        # Tokens that are padding repeat the last one; their results are not stored.
        x1 = x0 + tl.minimum(1, tokens - 1) * x_stride
        x2 = x0 + tl.minimum(2, tokens - 1) * x_stride
        x3 = x0 + tl.minimum(3, tokens - 1) * x_stride
        extra = tl.zeros((BLOCK_E, BLOCK_N), tl.int32)
        if HAS_SIGNS:
            extra = tl.load(signs + e[:, None] * padded + n[None, :], mask=live, other=0).to(tl.int32)
        for k in tl.static_range(PLANES):
            address = codes + ((k * elements + e) * WORDS)[:, None] * padded + n[None, :]
            state = load_elements(address, live, SCHEME, BITS)
            part0 = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)  # sum of x f
            part1, part2, part3 = part0, part0, part0
            sum0 = tl.zeros((BLOCK_E,), tl.float32)  # sum of x
            sum1, sum2, sum3 = sum0, sum0, sum0
            for i in tl.static_range(POSITIONS):
                column = column_in_group(inside, i, SCHEME, GROUP_ELEMENTS, LANE_STRIDE)
                used = real
                if not EVEN:
                    used = used & (column < GROUP) & (group * GROUP + column < cols)
                state, fraction, code = next_code(state, extra, address, padded, live, i, SCHEME, BITS)
                if SCHEME == TABLE:
                    at = (group * padded + n)[None, :] * (1 << BITS) + code
                    fraction = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
                part0, sum0 = _multiplied(x0 + column, used, fraction, part0, sum0)
                if TOKENS > 1:
                    part1, sum1 = _multiplied(x1 + column, used, fraction, part1, sum1)
                if TOKENS > 2:
                    part2, sum2 = _multiplied(x2 + column, used, fraction, part2, sum2)
                    part3, sum3 = _multiplied(x3 + column, used, fraction, part3, sum3)
            if SCHEME == TABLE:
                factor = tl.full((BLOCK_N,), 1.0, tl.float32)
                constant = tl.zeros((BLOCK_N,), tl.float32)
            else:
                at_scale = scales + group * padded + n
                if TIED:
                    scale = load_scales(at_scale, exponent, LOG8)
                    if k == 0:
                        scale = scale * WEIGHT0
                    elif k == 1:
                        scale = scale * WEIGHT1
                    else:
                        scale = scale * WEIGHT2
                else:
                    scale = load_scales(at_scale + k * GROUPS * padded, exponent, LOG8)
                factor = scale * (1 << BITS)
                if HAS_ZEROS:
                    constant = -((1 << BITS) + tl.load(zeros + group * padded + n).to(tl.float32)) * scale
                else:
                    constant = -((1 << BITS) + ZERO) * scale
            total0 = _scaled(part0, sum0, factor, constant, total0)
            if TOKENS > 1:
                total1 = _scaled(part1, sum1, factor, constant, total1)
            if TOKENS > 2:
                total2 = _scaled(part2, sum2, factor, constant, total2)
                total3 = _scaled(part3, sum3, factor, constant, total3)
    # 64 bits: splits times tokens times rows may pass 2^31
    at_out = out + (split * tokens).to(tl.int64) * rows + n
    shift = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    count = tl.zeros((BLOCK_N,), tl.int32) + tokens
    tl.store(at_out, (tl.sum(total0, 0) + shift).to(kind), mask=n < rows)
    if TOKENS > 1:
        tl.store(at_out + rows, (tl.sum(total1, 0) + shift).to(kind), mask=(n < rows) & (count > 1))
    if TOKENS > 2:
        tl.store(at_out + 2 * rows, (tl.sum(total2, 0) + shift).to(kind), mask=(n < rows) & (count > 2))
        tl.store(at_out + 3 * rows, (tl.sum(total3, 0) + shift).to(kind), mask=(n < rows) & (count > 3))
