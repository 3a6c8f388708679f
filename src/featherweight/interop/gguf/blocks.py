"""Blocks of GGUF tensors as whole numbers, scales and offsets: W = scale q + offset, exactly as ggml decodes them.

ggml multiplies in float32 a scale of the block by a small whole number, and adds what all weights of a group have in
common; a code of ours that holds the same numbers therefore decodes to the same bits. Where a block has a scale for its
scales (K-quants), their product, which ggml rounds to float32 as well, is what is stored.

The layouts are facts of ggml's `block_*` structures; tests/interop/test_gguf_types.py compares every decoded weight
with the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Parts(NamedTuple):
    """digits : uint8 [blocks, weights], the whole number + what makes it positive
    scales, offsets : float32 [blocks, groups of a block]; offsets None where all are 0
    """

    digits: Bytes
    scales: Floats
    offsets: Floats | None = None


@dataclass(frozen=True)
class Affine:
    """A type whose weights are scale (digit - zero) + offset.

    bits : of a digit
    group : neighbours that share a scale
    scales : the type that holds scales and offsets exactly
    zero : digit that stands for 0; with offsets 0, which they take in
    split : of the bytes of blocks, uint8 [blocks, bytes]
    fields : the bytes of a block that are digits of two bits, where such
    """

    bits: int
    group: int
    scales: torch.dtype
    zero: int
    split: Callable[[Bytes], Parts]
    offsets: bool = False
    fields: slice | None = None


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at a place of each block: [blocks, 1]."""
    found: Floats = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)
    return found


def _nibbles(raw: Bytes) -> Bytes:
    """Low halves of the bytes, then the high ones: [n, k] to [n, 2 k]."""
    halves: Bytes = np.concatenate([raw & 15, raw >> 4], axis=1)
    return halves


def _fields(raw: Bytes, bits: int, run: int) -> Bytes:
    """Fields of so many bits, from the lowest on; `run` bytes serve 8 / bits runs of weights, one field each."""
    chunks = raw.reshape(len(raw), -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields: Bytes = ((chunks >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)
    return fields


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """32 bits from a place on, the lowest first, as the fifth bit of a digit."""
    bits: Bytes = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits


def _q4_0(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Parts:
    return Parts(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Parts:
    return Parts(blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0))  # two's complement, 128 added


def _q2_k(blocks: Bytes) -> Parts:
    scales = blocks[:, :16]
    offsets = _half(blocks, 82) * (scales >> 4)
    return Parts(_fields(blocks[:, 16:80], 2, 32), _half(blocks, 80) * (scales & 15), -offsets)


def _q3_k(blocks: Bytes) -> Parts:
    high = _fields(blocks[:, :32], 1, 32)  # a 1 stands for nothing to take away
    low = _fields(blocks[:, 32:96], 2, 32)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8]) | _fields(packed[:, 8:], 2, 4) << np.uint8(4)
    return Parts(low | high << np.uint8(2), _half(blocks, 108) * (scales.astype(np.int8) - np.int8(32)))


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima of six bits in twelve bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << np.uint8(4)], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << np.uint8(4)], axis=1)
    return scales, minima


def _q4_k(blocks: Bytes) -> Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    return Parts(_fields(blocks[:, 16:], 4, 32), _half(blocks, 0) * scales, -(_half(blocks, 2) * minima))


def _q5_k(blocks: Bytes) -> Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    digits = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return Parts(digits, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima))


def _q6_k(blocks: Bytes) -> Parts:
    digits = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return Parts(digits, _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8))


def _q2_0(blocks: Bytes) -> Parts:
    return Parts(_fields(blocks[:, 2:], 2, 1), _half(blocks, 0))


def _tq2_0(blocks: Bytes) -> Parts:
    return Parts(_fields(blocks[:, :64], 2, 32), _half(blocks, 64))


def _tq1_0(blocks: Bytes) -> Parts:
    """Five trits a byte as a fraction of 256: times 3^n, the digit is what goes over 256 when it is tripled."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)
    runs = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    digits = [(raw[:, None, :] * powers[:count, None]).reshape(len(raw), -1) for raw, count in runs]
    tripled = np.concatenate(digits, axis=1).astype(np.uint16) * 3
    return Parts((tripled >> 8).astype(np.uint8), _half(blocks, 52))


def _q1_0(blocks: Bytes) -> Parts:
    return Parts(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), _half(blocks, 0))


IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
"""What the sixteen digits of IQ4 types stand for."""
FP4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)
"""Twice the sixteen values of four-bit floats (E2M1)."""
_IQ4_DIGITS, _FP4_DIGITS = (IQ4_LEVELS + 128).astype(np.uint8), (FP4_LEVELS + 16).astype(np.uint8)


def _iq4_nl(blocks: Bytes) -> Parts:
    return Parts(_IQ4_DIGITS[_nibbles(blocks[:, 2:])], _half(blocks, 0))


def _iq4_xs(blocks: Bytes) -> Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = blocks[:, 4:8]
    low = np.stack([low & 15, low >> 4], axis=2).reshape(len(blocks), 8)
    scales = (low | (high & 3).astype(np.uint8) << np.uint8(4)).astype(np.int8) - np.int8(32)
    digits = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(len(blocks), -1)
    return Parts(_IQ4_DIGITS[digits], _half(blocks, 0) * scales)


def _mxfp4(blocks: Bytes) -> Parts:
    exponents = blocks[:, :1].astype(np.int32)
    return Parts(_FP4_DIGITS[_nibbles(blocks[:, 1:])], np.ldexp(np.float32(1), exponents - 128).astype(np.float32))


def _nvfp4(blocks: Bytes) -> Parts:
    """A scale of eight bits (unsigned E4M3, halved) for each sixteen weights."""
    raw = blocks[:, :4].astype(np.int32)
    exponents, fractions = raw >> 3 & 15, (raw & 7).astype(np.float32)
    values = np.where(exponents == 0, np.ldexp(fractions, -10), np.ldexp(8 + fractions, exponents - 11))
    scales = np.where((raw == 0) | (raw == 0x7F), 0, values).astype(np.float32)
    digits = _nibbles(blocks[:, 4:].reshape(-1, 8)).reshape(len(blocks), -1)
    return Parts(_FP4_DIGITS[digits], scales)


HALF, FULL = torch.float16, torch.float32
AFFINE: dict[str, Affine] = {
    "Q4_0": Affine(4, 32, HALF, 8, _q4_0),
    "Q4_1": Affine(4, 32, HALF, 0, _q4_1, offsets=True),
    "Q5_0": Affine(5, 32, HALF, 16, _q5_0),
    "Q5_1": Affine(5, 32, HALF, 0, _q5_1, offsets=True),
    "Q8_0": Affine(8, 32, HALF, 128, _q8_0),
    "Q2_K": Affine(2, 16, FULL, 0, _q2_k, offsets=True),
    "Q3_K": Affine(3, 16, FULL, 4, _q3_k),
    "Q4_K": Affine(4, 32, FULL, 0, _q4_k, offsets=True),
    "Q5_K": Affine(5, 32, FULL, 0, _q5_k, offsets=True),
    "Q6_K": Affine(6, 16, FULL, 32, _q6_k),
    "IQ4_NL": Affine(8, 32, HALF, 128, _iq4_nl),
    "IQ4_XS": Affine(8, 32, FULL, 128, _iq4_xs),
    "MXFP4": Affine(5, 32, torch.bfloat16, 16, _mxfp4),
    "NVFP4": Affine(5, 16, HALF, 16, _nvfp4),
}
"""Types that are held as `uniform` codes."""
TERNARY: dict[str, Affine] = {
    "TQ1_0": Affine(2, 256, HALF, 1, _tq1_0),
    "TQ2_0": Affine(2, 256, HALF, 1, _tq2_0, fields=slice(0, 64)),
    "Q2_0": Affine(2, 64, HALF, 1, _q2_0, fields=slice(2, None)),
    "Q2_0 of 128": Affine(2, 128, HALF, 1, _q2_0, fields=slice(2, None)),
}
"""Types that are held as one trit-plane, where no digit is 3."""
SIGNS: dict[str, Affine] = {"Q1_0": Affine(1, 128, HALF, 0, _q1_0)}
"""Types that are held as one binary plane: digit 0 is -scale, digit 1 is +scale."""
