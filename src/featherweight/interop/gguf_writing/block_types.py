"""Types of ggml, and blocks made of integers: which integers a type holds, and where their bits lie.

A block is some neighbours of a row with a scale d in fp16, and in some types an offset m: w = d q + m, or w = d q where
there is none. Layouts are those of ggml's documentation of its blocks; the tests decode them by the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers8 = NDArray[np.int8]
Halves = NDArray[np.float16]
Pack = Callable[[Integers8, Halves, Halves], Bytes]


@dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    name : as llama.cpp prints it, "Q4_0"
    number : of the type in a file
    weights : of a block, neighbours in a row
    nbytes : of a block
    low, high : the integers q that it holds, where blocks are made of integers
    offset : whether a block has an m besides
    """

    name: str
    number: int
    weights: int
    nbytes: int
    low: int = 0
    high: int = 0
    offset: bool = False

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.weights

    @property
    def of_integers(self) -> bool:
        """Whether `pack_blocks` makes it."""
        return self.name in _PACKERS

    def fits_columns(self, columns: int) -> bool:
        """Whether rows of so many columns are whole blocks."""
        return columns % self.weights == 0


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("BF16", 30, 1, 2),
        BlockType("Q1_0", 41, 128, 18, -1, 1),
        BlockType("TQ1_0", 34, 256, 54, -1, 1),
        BlockType("TQ2_0", 35, 256, 66, -1, 1),
        BlockType("Q2_0", 42, 64, 18, -1, 2),
        BlockType("Q2_K", 10, 256, 84, -1, 1),
        BlockType("Q4_0", 2, 32, 18, -8, 7),
        BlockType("Q4_1", 3, 32, 20, 0, 15, offset=True),
        BlockType("Q5_0", 6, 32, 22, -16, 15),
        BlockType("Q5_1", 7, 32, 24, 0, 31, offset=True),
        BlockType("Q8_0", 8, 32, 34, -128, 127),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("IQ1_S", 19, 256, 50),
        BlockType("IQ1_M", 29, 256, 56),
        BlockType("IQ2_XXS", 16, 256, 66),
        BlockType("IQ2_XS", 17, 256, 74),
        BlockType("IQ2_S", 22, 256, 82),
        BlockType("IQ3_XXS", 18, 256, 98),
        BlockType("IQ3_S", 21, 256, 110),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ4_XS", 23, 256, 136),
    )
}
"""All that are written here, by name. Q2_K holds trits exactly but for its scales of four bits."""

EXACT = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Those whose blocks are integers with an fp16 scale, from the fewest bits up."""


def pack_blocks(kind: BlockType, integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    """Blocks of a type.

    integers : int8 [n, weights of a block], within [low, high] of the type
    scales, offsets : fp16 [n]; the latter count where the type has offsets. For Q2_K scales are float32 [n, 16], one
        for every 16 weights.

    Returns uint8 [n, bytes of a block].
    """
    return _PACKERS[kind.name](integers, scales, offsets)


def decode_blocks(kind: BlockType, blocks: Bytes) -> NDArray[np.float32]:
    """Values float32 [n, weights] of blocks [n, bytes], of any type here, as ggml decodes them."""
    if kind.name == "Q8_0":
        whole: NDArray[np.float32] = blocks[:, 2:].view(np.int8) * blocks[:, :2].copy().view(np.float16).astype(
            np.float32
        )
        return whole
    if kind.name in ("Q2_0", "Q1_0"):  # which releases of the `gguf` package do not know
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        if kind.name == "Q1_0":
            integers = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
        else:
            fields = [(blocks[:, 2:] >> (2 * k)) & 3 for k in range(4)]
            integers = np.stack(fields, -1).reshape(len(blocks), -1).astype(np.float32) - 1
        values: NDArray[np.float32] = integers * scales
        return values
    if kind.name == "F32":
        plain: NDArray[np.float32] = blocks.view(np.float32)
        return plain
    if kind.name == "F16":
        halves: NDArray[np.float32] = blocks.view(np.float16).astype(np.float32)
        return halves
    import gguf

    found: NDArray[np.float32] = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))
    return found


def _joined(count: int, *parts: NDArray[Any]) -> Bytes:
    """Parts [n, ...] of blocks, in the order in which they are stored."""
    views = [np.ascontiguousarray(part).reshape(count, -1).view(np.uint8) for part in parts]
    fields = [(f"part{k}", f"V{view.shape[1]}") for k, view in enumerate(views)]
    out = np.empty(count, np.dtype(fields))  # a part of a block is copied as one
    for (name, kind), view in zip(fields, views, strict=True):
        out[name] = np.ascontiguousarray(view).view(kind)[:, 0]
    return _as_bytes(out).reshape(count, -1)


_LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)


def _as_bytes(integers: NDArray[Any]) -> Bytes:
    found: Bytes = integers.view(np.uint8)
    return found


def _unsigned(integers: Integers8, zero: int) -> Bytes:
    return _as_bytes(integers + np.int8(zero))


def _nibbles(values: Bytes) -> Bytes:
    """Value j of 32 in the low half of byte j, value j + 16 in the high half; eight at a time."""
    words = np.ascontiguousarray(values).view(np.uint64)
    packed = np.empty((len(words), 2), np.uint64)
    for place in range(2):
        np.left_shift(words[:, place + 2] & _LOW_HALVES, np.uint64(4), out=packed[:, place])
        packed[:, place] |= words[:, place] & _LOW_HALVES
    return _as_bytes(packed)


def _fifth_bits(values: Bytes) -> Bytes:
    return np.packbits(values >> 4, axis=1, bitorder="little")


def _q4_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    return _joined(len(integers), scales, _nibbles(_unsigned(integers, 8)))


def _q4_1(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    return _joined(len(integers), scales, offsets, _nibbles(integers.view(np.uint8)))


def _q5_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    values = _unsigned(integers, 16)
    return _joined(len(integers), scales, _fifth_bits(values), _nibbles(values))


def _q5_1(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    values = integers.view(np.uint8)
    return _joined(len(integers), scales, offsets, _fifth_bits(values), _nibbles(values))


def _q8_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    return _joined(len(integers), scales, integers)


def _q1_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    return _joined(len(integers), scales, np.packbits(integers > 0, axis=1, bitorder="little"))


def _q2_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    """Four neighbours a byte: the bytes of a word of 32 bits moved onto each other."""
    words = np.ascontiguousarray(_unsigned(integers, 1)).view("<u4")
    words |= words >> np.uint32(6)
    return _joined(len(integers), scales, (words | (words >> np.uint32(12))).astype(np.uint8))


def _pairs(integers: Integers8) -> Bytes:
    """Of each half of 128: bits 2 l of byte m are element m + 32 l; 64 bytes a block."""
    fields = _unsigned(integers, 1).reshape(len(integers), 2, 4, 32)
    packed = fields[:, :, 0] | (fields[:, :, 1] << 2) | (fields[:, :, 2] << 4) | (fields[:, :, 3] << 6)
    return _as_bytes(packed).reshape(len(integers), 64)


def _tq2_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    return _joined(len(integers), _pairs(integers), scales)


_FIVE_TRITS = ((np.arange(243, dtype=np.uint32) * 256 + 242) // 243).astype(np.uint8)
"""The byte of a number below 3^5: its digits come out from the top by multiplying by three."""


def _tq1_0(integers: Integers8, scales: Halves, offsets: Halves) -> Bytes:
    digits, count = _unsigned(integers, 1), len(integers)
    parts = []
    for first, rows, lanes in ((0, 5, 32), (160, 5, 16), (240, 4, 4)):
        run = digits[:, first : first + rows * lanes].reshape(count, rows, lanes)
        number = np.zeros((count, lanes), np.uint8)
        for row in range(5):
            number = number * np.uint8(3) + (run[:, row] if row < rows else np.uint8(0))
        parts.append(_FIVE_TRITS[number])
    return _joined(count, *parts, scales)


def _q2_k(integers: Integers8, scales: NDArray[Any], offsets: Halves) -> Bytes:
    """W = d s (q - 1): scale and minimum of 16 weights are the same four bits s, d their common fp16."""
    wanted = np.asarray(scales, np.float32)
    negative = wanted < 0
    signs = np.where(negative, -1, 1).astype(np.int8).repeat(16, axis=1)
    wanted = np.abs(wanted)
    largest = wanted.max(axis=1, keepdims=True)
    best = np.full(len(wanted), np.inf, np.float32)
    steps, common = np.zeros(wanted.shape, np.uint8), np.zeros(len(wanted), np.float16)
    for top in range(1, 16):
        tried = np.where(largest > 0, largest / top, 1)
        codes = np.clip(np.rint(wanted / tried), 0, 15)
        norm = (codes * codes).sum(axis=1)
        fitted = np.where(norm > 0, (codes * wanted).sum(axis=1) / np.maximum(norm, 1), 0).astype(np.float16)
        lost = ((fitted[:, None].astype(np.float32) * codes - wanted) ** 2).sum(axis=1)
        better = lost < best
        best, common = np.where(better, lost, best), np.where(better, fitted, common)
        steps = np.where(better[:, None], codes, steps).astype(np.uint8)
    return _joined(len(wanted), steps | (steps << 4), _pairs(integers * signs), common, common)


_PACKERS: dict[str, Pack] = {
    "Q1_0": _q1_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
