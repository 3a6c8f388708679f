"""Device functions: from packed elements to weights in registers.

A code q of b bits is not converted to floating point, which GPUs do at a small part of their arithmetic rate. Its bits
are put at the top of the mantissa of 1.0 instead: the bit pattern 0x3F800000 | q << (23 - b) is 1 + q / 2^b, for one
shift and one three-input logic operation. What follows is linear in that fraction f:

    scale (q - z) = (2^b scale) f - (2^b + z) scale

so a kernel adds up x f and x alone and applies scale and zero once an element (`matvec`), or has both constants ready
for one fused multiply-add a weight (`tiles`).
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from featherweight.storage.codes.sherry import QUARTETS as _QUARTETS

FIELDS = tl.constexpr(0)
DIGITS = tl.constexpr(1)
TABLE = tl.constexpr(2)
QUARTETS = tl.constexpr(3)

_ONE = tl.constexpr(0x3F800000)


def _lane_digits(lane: int, sign: int) -> int:
    """Digits t + 1 of one lane of the 16 patterns, two bits each, as a signed 32-bit number."""
    word = sum((int(_QUARTETS[16 * sign + pattern, lane]) + 1) << 2 * pattern for pattern in range(16))
    return word - (1 << 32) if word >> 31 else word


_PLUS0, _MINUS0 = tl.constexpr(_lane_digits(0, 0)), tl.constexpr(_lane_digits(0, 1))
_PLUS1, _MINUS1 = tl.constexpr(_lane_digits(1, 0)), tl.constexpr(_lane_digits(1, 1))
_PLUS2, _MINUS2 = tl.constexpr(_lane_digits(2, 0)), tl.constexpr(_lane_digits(2, 1))
_PLUS3, _MINUS3 = tl.constexpr(_lane_digits(3, 0)), tl.constexpr(_lane_digits(3, 1))


@triton.jit
def column_in_group(
    inside,
    i: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP_ELEMENTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    QUADS: tl.constexpr,
    LANE_STRIDE: tl.constexpr,
):
    """The column within the group of position i of elements `inside` the group; from GROUP on it is padding."""
    if SCHEME == QUARTETS:
        quartet = (i // 4) * GROUP_ELEMENTS + inside
        return quartet // LANE_STRIDE * (4 * LANE_STRIDE) + quartet % LANE_STRIDE + (i % 4) * LANE_STRIDE
    elif QUADS:
        return (i % (POSITIONS // 4) * GROUP_ELEMENTS + inside) * 4 + i // (POSITIONS // 4)
    else:
        return i * GROUP_ELEMENTS + inside


@triton.jit
def next_code(
    state,
    extra,
    address,
    word_stride,
    live,
    i: tl.constexpr,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
):
    """Position i of elements: (state for position i + 1, the fraction 1 + code / 2^BITS, and for tables the code).

    `state` begins as the element's (first) word; fields of several words read the others here. `extra` holds the signs
    of quartets. Positions must be asked for in order.
    """
    if SCHEME == DIGITS:
        # A fixed-point fraction times its base: the digit rises above the point, 8 bits up for 3 levels, 16 for 9.
        if BITS == 2:
            state = state * 3
            bits = (state << 13) & 0x600000
            state = state & 0xFF
        else:
            state = state * 9
            bits = (state << 3) & 0x780000
            state = state & 0xFFFF
        return state, (bits | _ONE).to(tl.float32, bitcast=True), bits
    elif SCHEME == QUARTETS:
        pattern = (state >> (4 * (i // 4))) & 15
        negative = (extra & (1 << (i // 4))) != 0
        if i % 4 == 0:
            digits = tl.where(negative, _MINUS0, _PLUS0)
        elif i % 4 == 1:
            digits = tl.where(negative, _MINUS1, _PLUS1)
        elif i % 4 == 2:
            digits = tl.where(negative, _MINUS2, _PLUS2)
        else:
            digits = tl.where(negative, _MINUS3, _PLUS3)
        bits = ((digits >> (2 * pattern)) << 21) & 0x600000
        return state, (bits | _ONE).to(tl.float32, bitcast=True), bits
    else:
        shift: tl.constexpr = (BITS * i) % 32
        word: tl.constexpr = (BITS * i) // 32
        mask: tl.constexpr = (1 << BITS) - 1
        if shift == 0 and word > 0:
            state = tl.load(address + word * word_stride, mask=live, other=0)
        if shift + BITS > 32:  # the field lies in two words
            high = tl.load(address + (word + 1) * word_stride, mask=live, other=0)
            code = (((state >> shift) & ((1 << (32 - shift)) - 1)) | (high << (32 - shift))) & mask
            bits = code << (23 - BITS)
            state = high
        elif shift > 23 - BITS:
            code = (state >> shift) & mask
            bits = (state >> (shift - (23 - BITS))) & (mask << (23 - BITS))
        else:
            code = (state >> shift) & mask
            bits = (state << (23 - BITS - shift)) & (mask << (23 - BITS))
        return state, (bits | _ONE).to(tl.float32, bitcast=True), code


@triton.jit
def load_elements(address, live, SCHEME: tl.constexpr, BITS: tl.constexpr):
    """The (first) words of elements as int32."""
    word = tl.load(address, mask=live, other=0).to(tl.int32)
    if SCHEME == DIGITS and BITS == 4:
        word = word & 0xFFFF
    return word


@triton.jit
def load_scales(address, exponent, LOG8: tl.constexpr):
    """Scales as float32; one-byte scales u stand for 2^(exponent - u / 32), 255 for 0."""
    if LOG8:
        code = tl.load(address).to(tl.int32)
        value = tl.exp2(exponent - code.to(tl.float32) * 0.03125)
        return tl.where(code == 255, 0.0, value)
    else:
        return tl.load(address).to(tl.float32)


@triton.jit
def plane_scale(
    address,
    k: tl.constexpr,
    plane_stride,
    exponent,
    LOG8: tl.constexpr,
    TIED: tl.constexpr,
    WEIGHT0: tl.constexpr,
    WEIGHT1: tl.constexpr,
    WEIGHT2: tl.constexpr,
):
    """The scale of plane k: its own, or the one of all planes times the plane's weight."""
    if TIED:
        scale = load_scales(address, exponent, LOG8)
        if k == 0:
            return scale * WEIGHT0
        elif k == 1:
            return scale * WEIGHT1
        else:
            return scale * WEIGHT2
    else:
        return load_scales(address + k * plane_stride, exponent, LOG8)


@triton.jit
def dot4(a, b, c, PTX: tl.constexpr):
    """c + the product of four bytes of a, unsigned, with four of b, signed, all in words of 32 bits: exact.

    One instruction on NVIDIA's GPUs; elsewhere, and in the interpreter, the same in plain arithmetic.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            c += ((a >> (8 * byte)) & 255) * ((b << (24 - 8 * byte)) >> 24)
        return c
