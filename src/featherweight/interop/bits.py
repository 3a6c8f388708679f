"""Integers in 32-bit words, as other tools pack them: a dense little-endian bit string along one dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, unpack_bits

WORD = 32


def words_as_bytes(words: Tensor) -> Tensor:
    """uint8 of int32 words [rows, n], flattened, the lowest byte of a word first."""
    return torch.from_numpy(np.ascontiguousarray(words.numpy()).astype("<i4", copy=False).view(np.uint8).reshape(-1))


def bytes_as_words(data: Tensor, rows: int) -> Tensor:
    """int32 [rows, n] of uint8 bytes, a multiple of four in each row."""
    return torch.from_numpy(data.numpy().view("<i4").astype(np.int32, copy=False).reshape(rows, -1).copy())


def unpack_words(words: Tensor, count: int, bits: int) -> Tensor:
    """The `count` values of each row, uint8 [rows, count]: int32 words [rows, ceil(count bits / 32)], dense.

    ValueError where a row has another number of words.
    """
    rows, length = words.shape
    if length != -(-count * bits // WORD):
        raise ValueError(f"{length} words a row cannot hold {count} values of {bits} bits")
    held = length * WORD // bits  # values may end inside the last word of a row
    if length * WORD % bits == 0:
        return unpack_bits(words_as_bytes(words), rows * held, bits).view(rows, held)[:, :count].contiguous()
    raw = words_as_bytes(words).view(rows, length * WORD // 8)[:, : -(-count * bits // 8)]
    return torch.stack([unpack_bits(row.contiguous(), count, bits) for row in raw])


def pack_words(values: Tensor, bits: int) -> Tensor:
    """int32 words [rows, ceil(count bits / 32)] of uint8 values [rows, count], dense in each row."""
    rows, count = values.shape
    words = -(-count * bits // WORD)
    if count * bits % WORD:
        whole = -(-count // WORD) * WORD  # so many values fill whole words, whatever the bits
        values = torch.nn.functional.pad(values, (0, whole - count))
        packed = bytes_as_words(pack_bits(values.reshape(-1).contiguous(), bits), rows)
        return packed[:, :words].contiguous()
    return bytes_as_words(pack_bits(values.reshape(-1).contiguous(), bits), rows)


def unpack_padded(words: Tensor, count: int, bits: int) -> Tensor:
    """As `unpack_words`, of words that hold floor(32 / bits) whole values each, the bits above left empty."""
    each = WORD // bits
    rows, length = words.shape
    if length != -(-count // each):
        raise ValueError(f"{length} words a row cannot hold {count} values of {bits} bits, {each} a word")
    fields = [(words >> (bits * n)) & ((1 << bits) - 1) for n in range(each)]
    return torch.stack(fields, -1).view(rows, length * each)[:, :count].to(torch.uint8)


def pack_padded(values: Tensor, bits: int) -> Tensor:
    """int32 words [rows, ceil(count / floor(32 / bits))] of uint8 values [rows, count]; see `unpack_padded`."""
    each = WORD // bits
    rows, count = values.shape
    words = -(-count // each)
    fields = torch.nn.functional.pad(values, (0, words * each - count)).view(rows, words, each)
    packed = torch.zeros(rows, words, dtype=torch.int32)
    for n in range(each):
        packed |= fields[:, :, n].to(torch.int32) << (bits * n)
    return packed
