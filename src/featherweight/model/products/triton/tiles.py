"""Products with five tokens and more, on tensor cores, for layouts that `group_tiles` does not take: trits in base 3,
fields of odd widths or in odd groups, codebooks, quartets.

A tile of weights is decoded to the type of the activations in registers and goes into `tl.dot` position by position:
position i of a block of elements is a matrix [elements, rows] whose columns of the input are contiguous runs. Sums are
float32. With float32 inputs the products are IEEE float32, which is slow and meant for checks.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from featherweight.model.products.triton.decode import TABLE, column_in_group, load_elements, load_scales, next_code


@triton.jit
def tiles_kernel(
    x,  # [tokens, cols] float
    codes,
    scales,
    zeros,
    signs,
    bias,
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
    QUADS: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    LOG8: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,  # offsets into the matrix may pass 2^31
):
    if WIDE:
        padded = padded.to(tl.int64)
    # Programs with the same rows run next to each other, so that the weights they share stay in the second-level cache.
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # BLOCK_N divides `padded`
    split = tl.program_id(2)
    row_of_x = x + t.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        e = block * BLOCK_E + tl.arange(0, BLOCK_E)
        real = e < elements
        live = tl.broadcast_to(real[:, None], (BLOCK_E, BLOCK_N))
        # A block may span groups: every element has its own scale.
        group = tl.minimum(e, elements - 1) // GROUP_ELEMENTS
        inside = e % GROUP_ELEMENTS
        at_scale = group[:, None] * padded + n[None, :]
        at_code = (e * WORDS)[:, None] * padded + n[None, :]
        plane = elements * WORDS * padded
        extra = tl.zeros((BLOCK_E, BLOCK_N), tl.int32)
        if HAS_SIGNS:
            extra = tl.load(signs + e[:, None] * padded + n[None, :], mask=live, other=0).to(tl.int32)
        state0 = load_elements(codes + at_code, live, SCHEME, BITS)
        # A weight is the sum over planes of f_k factor_k, plus one constant: a fused multiply-add a plane.
        if SCHEME != TABLE:
            scale = load_scales(scales + at_scale, exponent, LOG8)
            zero = tl.load(zeros + at_scale).to(tl.float32) if HAS_ZEROS else ZERO
            scale0 = scale * WEIGHT0
            constant = -((1 << BITS) + zero) * scale0
            if PLANES > 1:
                state1 = load_elements(codes + plane + at_code, live, SCHEME, BITS)
                at = scales + 1 * GROUPS * padded + at_scale
                scale1 = scale * WEIGHT1 if TIED else load_scales(at, exponent, LOG8)
                constant -= ((1 << BITS) + zero) * scale1
            if PLANES > 2:
                state2 = load_elements(codes + 2 * plane + at_code, live, SCHEME, BITS)
                at = scales + 2 * GROUPS * padded + at_scale
                scale2 = scale * WEIGHT2 if TIED else load_scales(at, exponent, LOG8)
                constant -= ((1 << BITS) + zero) * scale2
        for i in tl.static_range(POSITIONS):
            column = column_in_group(inside, i, SCHEME, GROUP_ELEMENTS, POSITIONS, QUADS, LANE_STRIDE)
            used = real[None, :] & (t < tokens)[:, None]
            if not EVEN:
                used = used & ((column < GROUP) & (group * GROUP + column < cols))[None, :]
            values = tl.load(row_of_x + (group * GROUP + column)[None, :], mask=used, other=0.0)
            state0, fraction, code = next_code(state0, extra, codes + at_code, padded, live, i, SCHEME, BITS)
            if SCHEME == TABLE:
                weight = tl.load(scales + at_scale * (1 << BITS) + code, mask=live, other=0.0).to(tl.float32)
            else:
                weight = tl.fma(fraction, scale0 * (1 << BITS), constant)
                if PLANES > 1:
                    state1, fraction, code = next_code(state1, extra, codes, padded, live, i, SCHEME, BITS)
                    weight = tl.fma(fraction, scale1 * (1 << BITS), weight)
                if PLANES > 2:
                    state2, fraction, code = next_code(state2, extra, codes, padded, live, i, SCHEME, BITS)
                    weight = tl.fma(fraction, scale2 * (1 << BITS), weight)
            total = tl.dot(values, weight.to(values.dtype), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    at_out = (split * tokens + t).to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=(t < tokens)[:, None] & (n < rows)[None, :])
