"""Products with one to four tokens: what decoding a text needs. The limit is reading the weights.

A program has `BLOCK_N` rows, and `LANES` chunks of a row's elements go side by side, a warp or part of one to each. A
chunk is elements of one group, spelled out, so that all its loads are on their way before the first is used; a lane
has rows of its own and adds up in registers; lanes of different chunks meet only once, at the end. Where rows are too
few to fill the GPU, splits of the chunks write partial results side by side, which `epilogue` adds in a fixed order:
no atomics, the result does not depend on scheduling.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from featherweight.model.products.triton.decode import (
    TABLE,
    column_in_group,
    dot4,
    load_elements,
    load_scales,
    next_code,
    plane_scale,
)


@triton.jit
def _multiplied(address, used, fraction, part, sum):
    """One position of one token: the sums of x f [lanes, rows] and of x [lanes], continued."""
    value = tl.load(address, mask=used, other=0.0).to(tl.float32)
    return tl.fma(tl.broadcast_to(value[:, None], fraction.shape), fraction, part), sum + value


@triton.jit
def _scaled(part, sum, factor, constant, total):
    """total + scale (sum of x (q - zero)) = total + factor (sum of x f) + constant (sum of x): see `decode`."""
    return tl.fma(tl.broadcast_to(sum[:, None], part.shape), constant, tl.fma(part, factor, total))


@triton.jit
def store_tokens(out, total0, total1, total2, total3, bias, n, split, tokens, rows, HAS_BIAS, TOKENS):
    """The sums over lanes, with the bias, to out [splits, tokens, rows]."""
    # 64 bits: splits times tokens times rows may pass 2^31
    at_out = out + (split * tokens).to(tl.int64) * rows + n
    shift = tl.zeros(n.shape, tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    count = tl.zeros(n.shape, tl.int32) + tokens
    tl.store(at_out, (tl.sum(total0, 0) + shift).to(kind), mask=n < rows)
    if TOKENS > 1:
        tl.store(at_out + rows, (tl.sum(total1, 0) + shift).to(kind), mask=(n < rows) & (count > 1))
    if TOKENS > 2:
        tl.store(at_out + 2 * rows, (tl.sum(total2, 0) + shift).to(kind), mask=(n < rows) & (count > 2))
        tl.store(at_out + 3 * rows, (tl.sum(total3, 0) + shift).to(kind), mask=(n < rows) & (count > 3))


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
    chunks,
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
    EVEN: tl.constexpr,  # groups are full of columns and elements full of weights: no masks
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of a chunk
    WIDE: tl.constexpr,  # offsets into the matrix may pass 2^31
):
    if WIDE:
        padded = padded.to(tl.int64)
    # BLOCK_N divides `padded`: no masks along rows, and loads of 16 bytes a lane.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    CHUNKS_OF_GROUP: tl.constexpr = (GROUP_ELEMENTS + CHUNK - 1) // CHUNK
    # Tokens are spelled out, not a third dimension: all tensors then share the layout in which the weights are loaded.
    total0 = tl.zeros((LANES, BLOCK_N), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        chunk = block * LANES + tl.arange(0, LANES)
        within = chunk < chunks
        group = tl.minimum(chunk // CHUNKS_OF_GROUP, GROUPS - 1)
        first = chunk % CHUNKS_OF_GROUP * CHUNK
        x0 = x + group * GROUP
        # Tokens that are padding repeat the last one; their results are not stored.
        x1 = x0 + tl.minimum(1, tokens - 1) * x_stride
        x2 = x0 + tl.minimum(2, tokens - 1) * x_stride
        x3 = x0 + tl.minimum(3, tokens - 1) * x_stride
        for k in tl.static_range(PLANES):
            part0 = tl.zeros((LANES, BLOCK_N), tl.float32)  # sum of x f
            part1, part2, part3 = part0, part0, part0
            sum0 = tl.zeros((LANES,), tl.float32)  # sum of x
            sum1, sum2, sum3 = sum0, sum0, sum0
            # All elements are asked for before the first is used: the compiler leaves loads in their order.
            states = ()
            for step in tl.static_range(CHUNK):
                inside = first + step
                real = within if GROUP_ELEMENTS % CHUNK == 0 else within & (inside < GROUP_ELEMENTS)
                e = group * GROUP_ELEMENTS + inside
                address = codes + ((k * elements + e) * WORDS)[:, None] * padded + n[None, :]
                live = tl.broadcast_to(real[:, None], (LANES, BLOCK_N))
                states = states + (load_elements(address, live, SCHEME, BITS),)
            for step in tl.static_range(CHUNK):
                inside = first + step
                real = within if GROUP_ELEMENTS % CHUNK == 0 else within & (inside < GROUP_ELEMENTS)
                live = tl.broadcast_to(real[:, None], (LANES, BLOCK_N))
                e = group * GROUP_ELEMENTS + inside
                address = codes + ((k * elements + e) * WORDS)[:, None] * padded + n[None, :]
                state = states[step]
                extra = tl.zeros((LANES, BLOCK_N), tl.int32)
                if HAS_SIGNS:
                    extra = tl.load(signs + e[:, None] * padded + n[None, :], mask=live, other=0).to(tl.int32)
                for i in tl.static_range(POSITIONS):
                    column = column_in_group(inside, i, SCHEME, GROUP_ELEMENTS, POSITIONS, QUADS, LANE_STRIDE)
                    used = real
                    if not EVEN:
                        used = used & (column < GROUP) & (group * GROUP + column < cols)
                    state, fraction, code = next_code(state, extra, address, padded, live, i, SCHEME, BITS)
                    if SCHEME == TABLE:
                        at = (group[:, None] * padded + n[None, :]) * (1 << BITS) + code
                        fraction = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
                    part0, sum0 = _multiplied(x0 + column, used, fraction, part0, sum0)
                    if TOKENS > 1:
                        part1, sum1 = _multiplied(x1 + column, used, fraction, part1, sum1)
                    if TOKENS > 2:
                        part2, sum2 = _multiplied(x2 + column, used, fraction, part2, sum2)
                        part3, sum3 = _multiplied(x3 + column, used, fraction, part3, sum3)
            if SCHEME == TABLE:
                factor = tl.full((LANES, BLOCK_N), 1.0, tl.float32)
                constant = tl.zeros((LANES, BLOCK_N), tl.float32)
            else:
                at_scale = group[:, None] * padded + n[None, :]
                scale = plane_scale(
                    scales + at_scale, k, GROUPS * padded, exponent, LOG8, TIED, WEIGHT0, WEIGHT1, WEIGHT2
                )
                factor = scale * (1 << BITS)
                if HAS_ZEROS:
                    constant = -((1 << BITS) + tl.load(zeros + at_scale).to(tl.float32)) * scale
                else:
                    constant = -((1 << BITS) + ZERO) * scale
            total0 = _scaled(part0, sum0, factor, constant, total0)
            if TOKENS > 1:
                total1 = _scaled(part1, sum1, factor, constant, total1)
            if TOKENS > 2:
                total2 = _scaled(part2, sum2, factor, constant, total2)
                total3 = _scaled(part3, sum3, factor, constant, total3)
    store_tokens(out, total0, total1, total2, total3, bias, n, split, tokens, rows, HAS_BIAS, TOKENS)


@triton.jit
def matvec_int8_kernel(
    x,  # [tokens, cols / 4] int32: four int8 activations each
    x_scales,  # [tokens, groups] float32
    codes,  # [planes, elements, padded] int32: fields in quads
    scales,  # [planes, groups, padded]
    zeros,  # [groups, padded] uint8, or anything
    bias,  # [rows], or anything
    out,  # [splits, tokens, rows]
    tokens,
    rows,
    x_stride,
    padded,
    groups,
    chunks,
    blocks,
    blocks_per_split,
    exponent,
    BITS: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    PLANES: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOG8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of a group at a time; divides GROUP_ELEMENTS
    RUN: tl.constexpr,  # groups of a chunk: more than one where a group is one piece
    WIDE: tl.constexpr,  # offsets into the matrix may pass 2^31
):
    if WIDE:
        padded = padded.to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    SHIFTS: tl.constexpr = 8 // BITS
    PIECES: tl.constexpr = GROUP_ELEMENTS // CHUNK
    total0 = tl.zeros((LANES, BLOCK_N), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)):
        chunk = block * LANES + tl.arange(0, LANES)
        within = chunk < chunks
        chunk = tl.minimum(chunk, chunks - 1)  # a lane too many repeats the last one with activations of zero
        live = tl.broadcast_to(within[:, None], (LANES, BLOCK_N))
        for run in tl.static_range(RUN):
            group = chunk // PIECES * RUN + run
            first = chunk % PIECES * CHUNK
            x0 = x + group * (GROUP_ELEMENTS * SHIFTS) + first
            x1 = x0 + tl.minimum(1, tokens - 1) * x_stride
            x2 = x0 + tl.minimum(2, tokens - 1) * x_stride
            x3 = x0 + tl.minimum(3, tokens - 1) * x_stride
            at_group = group[:, None] * padded + n[None, :]
            zero = tl.full((LANES, BLOCK_N), ZERO, tl.int32)
            if HAS_ZEROS:
                zero = tl.load(zeros + at_group, mask=live, other=0).to(tl.int32)
            for k in tl.static_range(PLANES):
                part0 = tl.zeros((LANES, BLOCK_N), tl.int32)  # sum of x q
                part1, part2, part3 = part0, part0, part0
                sum0 = tl.zeros((LANES,), tl.int32)  # sum of x
                sum1, sum2, sum3 = sum0, sum0, sum0
                at = codes + (((k * groups + group) * GROUP_ELEMENTS + first) * padded)[:, None] + n[None, :]
                scale = load_scales(scales + k * groups * padded + at_group, exponent, LOG8)
                # All words are asked for before the first is used: the compiler leaves loads in their order.
                words = ()
                for step in tl.static_range(CHUNK):
                    words = words + (tl.load(at + step * padded, mask=live, other=0),)
                for j in tl.static_range(SHIFTS):
                    place = j * GROUP_ELEMENTS
                    values0 = _values(x0 + place, within, CHUNK)
                    part0, sum0 = _dotted(words, values0, part0, sum0, BITS, j, CHUNK, PTX)
                    if TOKENS > 1:
                        values1 = _values(x1 + place, within, CHUNK)
                        part1, sum1 = _dotted(words, values1, part1, sum1, BITS, j, CHUNK, PTX)
                    if TOKENS > 2:
                        values2 = _values(x2 + place, within, CHUNK)
                        part2, sum2 = _dotted(words, values2, part2, sum2, BITS, j, CHUNK, PTX)
                        values3 = _values(x3 + place, within, CHUNK)
                        part3, sum3 = _dotted(words, values3, part3, sum3, BITS, j, CHUNK, PTX)
                at_x = x_scales + group
                total0 += _exact(part0, sum0, zero) * (scale * tl.load(at_x, mask=within, other=0.0)[:, None])
                if TOKENS > 1:
                    at_x += tl.minimum(1, tokens - 1) * groups
                    total1 += _exact(part1, sum1, zero) * (scale * tl.load(at_x, mask=within, other=0.0)[:, None])
                if TOKENS > 2:
                    at_x = x_scales + group + tl.minimum(2, tokens - 1) * groups
                    total2 += _exact(part2, sum2, zero) * (scale * tl.load(at_x, mask=within, other=0.0)[:, None])
                    at_x = x_scales + group + tl.minimum(3, tokens - 1) * groups
                    total3 += _exact(part3, sum3, zero) * (scale * tl.load(at_x, mask=within, other=0.0)[:, None])
    store_tokens(out, total0, total1, total2, total3, bias, n, split, tokens, rows, HAS_BIAS, TOKENS)


@triton.jit
def _values(address, used, CHUNK: tl.constexpr):
    """Words of four activations of one token, one [lanes] for each of `CHUNK` elements."""
    values = ()
    for step in tl.static_range(CHUNK):
        values = values + (tl.load(address + step, mask=used, other=0),)
    return values


@triton.jit
def _dotted(words, values, part, sum, BITS: tl.constexpr, j: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """Field j of every byte, for one token: the sums of x q [lanes, rows] and of x [lanes], continued, exact."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01010101 if BITS < 8 else -1
    for step in tl.static_range(CHUNK):
        four = (words[step] >> (BITS * j)) & MASK
        ones = tl.full(values[step].shape, 0x01010101, tl.int32)
        part = dot4(four, tl.broadcast_to(values[step][:, None], four.shape), part, PTX)
        sum = dot4(ones, values[step], sum, PTX)
    return part, sum


@triton.jit
def _exact(part, sum, zero):
    """The sum of x (q - zero), an integer, as float32."""
    return (part - sum[:, None] * zero).to(tl.float32)
