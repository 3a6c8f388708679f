"""Decoders of other tools' layers in numpy, one value after the other, from what is said of their layouts.

They share nothing with the package: whole Python integers hold the bit strings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def string_of(words: NDArray[np.int32]) -> int:
    """The words of one row or column as one integer, the first word lowest."""
    return sum(int(word) % (1 << 32) << (32 * place) for place, word in enumerate(words))


def dense(words: NDArray[np.int32], count: int, bits: int) -> Ints:
    held = string_of(words)
    return np.array([held >> (bits * n) & ((1 << bits) - 1) for n in range(count)])


def padded(words: NDArray[np.int32], count: int, bits: int) -> Ints:
    each, mask = 32 // bits, (1 << bits) - 1
    return np.array([int(words[n // each]) % (1 << 32) >> (bits * (n % each)) & mask for n in range(count)])


def gptq(
    qweight: NDArray[np.int32],
    qzeros: NDArray[np.int32],
    scales: NDArray[np.float16],
    g_idx: Ints,
    bits: int,
    less: int,
) -> Floats:
    """W [out, in]; `less` is what is taken from zero points when they are stored."""
    columns, out = len(g_idx), qweight.shape[1]
    codes = np.stack([dense(qweight[:, o], columns, bits) for o in range(out)])
    zeros = np.stack([dense(row, out, bits) for row in qzeros]) + less
    signed = (codes - zeros[g_idx].T).astype(np.float32)
    return signed * scales[g_idx].T.astype(np.float32)


def awq(qweight: NDArray[np.int32], qzeros: NDArray[np.int32], scales: NDArray[np.float16], group_size: int) -> Floats:
    def unpacked(words: NDArray[np.int32]) -> Ints:
        found = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for row in range(words.shape[0]):
            for place in range(words.shape[1]):
                for nibble, output in enumerate(AWQ_ORDER):
                    found[row, 8 * place + output] = int(words[row, place]) >> (4 * nibble) & 15
        return found

    group = np.arange(qweight.shape[0]) // group_size
    signed = (unpacked(qweight) - unpacked(qzeros)[group]).astype(np.float32)
    return (signed * scales[group].astype(np.float32)).T


def awq_gemv(
    qweight: NDArray[np.int32], qzeros: NDArray[np.int32], scales: NDArray[np.float16], group_size: int
) -> Floats:
    columns = qweight.shape[1] * 8
    group = np.arange(columns) // group_size
    codes = np.stack([padded(row, columns, 4) for row in qweight])
    zeros = np.stack([padded(row, qzeros.shape[1] * 8, 4) for row in qzeros])
    return (codes - zeros[:, group]).astype(np.float32) * scales[:, group].astype(np.float32)


def compressed_tensors(
    packed: NDArray[np.int32],
    scale: NDArray[np.float16],
    zeros: NDArray[np.int32] | None,
    index: Ints | None,
    shape: tuple[int, int],
    bits: int,
    is_padded: bool,
) -> Floats:
    unpack = padded if is_padded else dense
    rows, columns = shape
    groups = scale.shape[1]
    codes = np.stack([unpack(row, columns, bits) for row in packed])
    points = np.full((rows, groups), 1 << (bits - 1))
    if zeros is not None:
        points = np.stack([unpack(zeros[:, g], rows, bits) for g in range(groups)], 1)
    group = np.arange(columns) // (columns // groups) if index is None else index
    return (codes - points[:, group]).astype(np.float32) * scale[:, group].astype(np.float32)
