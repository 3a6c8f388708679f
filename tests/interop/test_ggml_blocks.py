"""Blocks made of integers against the decoder of the `gguf` package, and Q1_0 and Q2_0, which it lacks, by hand."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest

from featherweight.interop.gguf_writing.block_types import EXACT, TYPES, decode_blocks, pack_blocks

BLOCKS = 37
BY_HAND = ("Q1_0", "Q2_0")


def problem(name: str) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """A type, integers that use all of its range, scales, offsets."""
    kind, rng = TYPES[name], np.random.default_rng(7)
    integers = rng.integers(kind.low, kind.high + 1, (BLOCKS, kind.weights)).astype(np.int8)
    if name == "Q1_0":
        integers[integers == 0] = 1
    scales = rng.normal(size=BLOCKS).astype(np.float16)
    return kind, integers, scales, rng.normal(size=BLOCKS).astype(np.float16)


def meant(name: str, integers: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    values = integers.astype(np.float32) * scales.astype(np.float32)[:, None]
    return values + offsets.astype(np.float32)[:, None] if TYPES[name].offset else values


@pytest.mark.parametrize("name", [name for name in EXACT if name not in BY_HAND])
def test_blocks_are_what_the_package_decodes(name: str) -> None:
    kind, integers, scales, offsets = problem(name)
    blocks = pack_blocks(kind, integers, scales, offsets)
    assert blocks.shape == (BLOCKS, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1])
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(decoded, meant(name, integers, scales, offsets))
    np.testing.assert_array_equal(decode_blocks(kind, blocks), decoded)


@pytest.mark.parametrize("name", BY_HAND)
def test_blocks_of_newer_types(name: str) -> None:
    kind, integers, scales, offsets = problem(name)
    blocks = pack_blocks(kind, integers, scales, offsets)
    assert blocks.shape == (BLOCKS, 18)
    per_byte = kind.weights // 16
    for block in range(BLOCKS):
        assert blocks[block, :2].tobytes() == scales[block].tobytes()
        for place in range(kind.weights):
            bits = 8 // per_byte
            field = int(blocks[block, 2 + place // per_byte]) >> (bits * (place % per_byte)) & ((1 << bits) - 1)
            integer = 2 * field - 1 if name == "Q1_0" else field - 1
            assert integer == integers[block, place]
    np.testing.assert_array_equal(decode_blocks(kind, blocks), meant(name, integers, scales, offsets))


def test_equal_scales_are_exact_in_q2_k() -> None:
    rng = np.random.default_rng(3)
    integers = rng.integers(-1, 2, (BLOCKS, 256)).astype(np.int8)
    scales = rng.normal(size=BLOCKS).astype(np.float16).astype(np.float32)
    blocks = pack_blocks(TYPES["Q2_K"], integers, scales[:, None].repeat(16, 1), scales)
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q2_K)
    np.testing.assert_array_equal(decoded, integers * scales[:, None])


def test_different_scales_are_rounded_to_four_bits_in_q2_k() -> None:
    rng = np.random.default_rng(4)
    integers = rng.integers(-1, 2, (BLOCKS, 256)).astype(np.int8)
    scales = rng.uniform(0.5, 1.5, (BLOCKS, 16)).astype(np.float32)
    blocks = pack_blocks(TYPES["Q2_K"], integers, scales, scales)
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q2_K)
    spread = scales.repeat(16, 1)
    assert (np.sign(decoded) == integers).all()
    step = scales.max(axis=1, keepdims=True).astype(np.float16).astype(np.float32) / 15
    simple = (integers * (np.rint(scales / step) * step).repeat(16, 1)).astype(np.float32)
    assert np.square(decoded - integers * spread).sum() <= np.square(simple - integers * spread).sum()


def test_numbers_and_sizes_are_those_of_the_package() -> None:
    for name, kind in TYPES.items():
        if name in gguf.GGMLQuantizationType.__members__:
            member = gguf.GGMLQuantizationType[name]
            assert (kind.number, (kind.weights, kind.nbytes)) == (member.value, gguf.GGML_QUANT_SIZES[member])
