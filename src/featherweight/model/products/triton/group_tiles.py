"""Products with five tokens and more for fields that fill their words: whole tiles of a group on tensor cores.

Shift by a vector of positions, and a block of words [elements, rows] becomes a tile [shifts, elements, bytes,
rows], which is a matrix [columns, rows] as it stands: fields lie in quads (`operand`). One `tl.dot` a tile then takes
up to 128 columns, and activations are read as they lie.

With activations of 8 bits the tile holds q - zero as int8 and the sums of a tile are integers, exact: at most 2^16
columns of one scale, times 127 128, stay below 2^31. Zero points z enter as (zero - z) times the sum of the
activations' codes, an integer too. In floating point the tile is scaled and rounded to the type of the activations.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from featherweight.model.products.triton.decode import load_scales


@triton.jit
def group_tiles_kernel(
    x,  # [tokens, cols] int8 or float
    x_scales,  # [tokens, groups] float32, or anything in floating point
    x_sums,  # [tokens, groups] int32, or anything
    codes,  # [planes, elements, padded] int32
    scales,  # [planes, groups, padded]
    zeros,  # [groups, padded] uint8, or anything
    bias,
    out,  # [splits, tokens, rows]
    tokens,
    rows,
    cols,
    x_stride,
    padded,
    groups,
    blocks,
    blocks_per_split,
    exponent,
    BITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOG8: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT8: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # divides GROUP_ELEMENTS
    WIDE: tl.constexpr,  # offsets into the matrix may pass 2^31
):
    if WIDE:
        padded = padded.to(tl.int64)
    TILE: tl.constexpr = POSITIONS * BLOCK_E
    BLOCKS_OF_GROUP: tl.constexpr = GROUP_ELEMENTS // BLOCK_E
    # Programs with the same rows run next to each other, so that the weights they share stay in the second-level cache.
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # BLOCK_N divides `padded`
    split = tl.program_id(2)
    SHIFTS: tl.constexpr = POSITIONS // 4
    shift = (tl.arange(0, SHIFTS)[:, None] + tl.arange(0, 4)[None, :] * SHIFTS) * BITS  # of byte b's j-th field
    place = tl.arange(0, TILE)
    in_tile = place // (4 * BLOCK_E) * (4 * GROUP_ELEMENTS) + place % (4 * BLOCK_E)
    row_of_x = x + t.to(tl.int64)[:, None] * x_stride
    at_token = t.to(tl.int64) * groups
    real = t < tokens
    total = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        group = block // BLOCKS_OF_GROUP
        first = (block % BLOCKS_OF_GROUP) * BLOCK_E
        column = 4 * first + in_tile
        used = real[:, None] & (place >= 0)[None, :]
        if not EVEN:
            used = used & ((column < GROUP) & (group * GROUP + column < cols))[None, :]
        values = tl.load(row_of_x + (group * GROUP + column)[None, :], mask=used, other=0)
        e = group * GROUP_ELEMENTS + first + tl.arange(0, BLOCK_E)
        for k in tl.static_range(PLANES):
            at = (k * groups * GROUP_ELEMENTS + e)[:, None] * padded + n[None, :]
            words = tl.load(codes + at)
            q = (words[None, :, None, :] >> shift[:, None, :, None]) & ((1 << BITS) - 1)
            scale = load_scales(scales + (k * groups + group) * padded + n, exponent, LOG8)
            if INT8:
                weights = tl.reshape((q - ZERO).to(tl.int8), (TILE, BLOCK_N))
                product = tl.dot(values, weights, out_dtype=tl.int32)
                if HAS_ZEROS:
                    # The sum belongs to the whole group: it enters with the group's first block.
                    zero = tl.load(zeros + group * padded + n).to(tl.int32)
                    opens = tl.zeros((TOKENS,), tl.int32) + first == 0
                    x_sum = tl.load(x_sums + at_token + group, mask=real & opens, other=0)
                    product += x_sum[:, None] * (ZERO - zero)[None, :]
                x_scale = tl.load(x_scales + at_token + group, mask=real, other=0.0)
                total += product.to(tl.float32) * (x_scale[:, None] * scale[None, :])
            else:
                # 1 + q / 2^BITS by its bits (`decode`), then one fused multiply-add to the weight.
                fraction = ((q << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
                if HAS_ZEROS:
                    constant = -((1 << BITS) + tl.load(zeros + group * padded + n).to(tl.float32)) * scale
                else:
                    constant = -((1 << BITS) + ZERO) * scale
                weight = tl.fma(fraction, (scale * (1 << BITS))[None, None, None, :], constant[None, None, None, :])
                weights = tl.reshape(weight.to(values.dtype), (TILE, BLOCK_N))
                total = tl.dot(values, weights, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    at_out = (split * tokens + t).to(tl.int64)[:, None] * rows + n[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=real[:, None] & (n < rows)[None, :])
