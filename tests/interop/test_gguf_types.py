"""Blocks of GGUF tensors: whole numbers, scales and offsets give the very bits that the package gguf decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from featherweight.errors import CheckpointError
from featherweight.interop.gguf.blocks import AFFINE, SIGNS, TERNARY
from featherweight.interop.gguf.file import GGUFFile, Stored
from featherweight.interop.gguf.tensors import Source
from featherweight.interop.gguf.types import Q2_0_WIDE, TYPES, BlockType
from featherweight.model.products import apply_terms, pack_code
from featherweight.storage.codes import Code

HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "NVFP4": (), "MXFP4": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ3_XXS": (0,), "IQ1_S": (0,), "IQ3_S": (0,),
    "IQ2_S": (0,), "IQ1_M": (), "Q1_0": (0,), "Q2_0": (0,), "Q2_0 of 128": (0,),
}  # fmt: skip
"""Where each type has float16 numbers, which random bytes would make infinite."""
KINDS = {kind.name: kind for kind in [*TYPES.values(), Q2_0_WIDE] if kind.name in HALVES}
ROWS, COLUMNS = 90, 512  # more than a window's rows are asked for below


def blocks(kind: BlockType, seed: int = 0) -> np.ndarray:
    """Random bytes of rows, uint8 [ROWS, bytes], with scales of either sign."""
    generator = np.random.default_rng(seed)
    count = ROWS * COLUMNS // kind.weights
    raw = generator.integers(0, 256, (count, kind.bytes), dtype=np.uint8)
    for start in HALVES[kind.name]:
        scales = (generator.standard_normal((count, 1)) * 0.02).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = generator.integers(0, 250, count)
    if kind.name == "IQ1_M":  # the four highest bits of four numbers are one float16
        raw[:, 55] &= 0x3F
    return raw.reshape(ROWS, -1)


def by_hand(kind: BlockType, raw: np.ndarray) -> np.ndarray:
    """The types that the package does not decode, one weight after the other."""
    values = []
    for block in raw.reshape(-1, kind.bytes):
        scale = np.float32(block[:2].view(np.float16)[0])
        for j in range(kind.weights):
            if kind.name == "Q1_0":
                values.append(scale if block[2 + j // 8] >> (j % 8) & 1 else -scale)
            else:
                values.append(np.float32(int(block[2 + j // 4] >> (2 * (j % 4)) & 3) - 1) * scale)
    return np.array(values, np.float32).reshape(ROWS, COLUMNS)


def expected(kind: BlockType, raw: np.ndarray) -> np.ndarray:
    if kind.name in ("Q1_0", "Q2_0", "Q2_0 of 128"):
        return by_hand(kind, raw)
    return np.asarray(gguf.dequantize(raw, Type(kind.number)))


def stored(path: Path, kind: BlockType, raw: np.ndarray) -> Stored:
    """A file with this one tensor, opened."""
    head = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([1, 0], "<u8").tobytes()
    head += np.array([1], "<u8").tobytes() + b"t" + np.array([2], "<u4").tobytes()
    head += np.array([COLUMNS, ROWS], "<u8").tobytes() + np.array([kind.number], "<u4").tobytes() + bytes(8)
    path.write_bytes(head + bytes(-len(head) % 32) + raw.tobytes())
    file = GGUFFile(path)
    return Stored(file, file.header.tensors["t"])


def bits(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("name", KINDS)
def test_a_type_decodes_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the code it becomes, and decoded; rows in their order and in another; in windows of few rows."""
    monkeypatch.setattr("featherweight.interop.gguf.tensors.WINDOW_WEIGHTS", 1)
    kind = KINDS[name]
    raw = blocks(kind)
    tensor, values = stored(tmp_path / "t.gguf", kind, raw), expected(kind, raw)
    assert tensor.info.type == kind
    for order in (None, np.random.default_rng(1).permutation(ROWS)):
        wanted = values if order is None else values[order]
        plain = Source("x.weight", (tensor,), order).described().load()
        assert isinstance(plain, torch.Tensor)
        assert plain.dtype == torch.float32
        assert np.array_equal(bits(plain), bits(wanted))
        described = Source("x.weight", (tensor,), order, coded=True).described()
        found = described.load()
        if described.spec is None:
            assert name.startswith("IQ")
            assert isinstance(found, torch.Tensor)
            continue
        assert isinstance(found, Code)
        assert found.spec == described.spec
        assert np.array_equal(bits(found.decode()), bits(wanted))
        assert found.nbytes == described.nbytes
        assert found.nbytes < values.nbytes / 3


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "Q2_0 of 128", "Q1_0"])
def test_trits_and_signs_become_planes(name: str, tmp_path: Path) -> None:
    kind, generator = KINDS[name], np.random.default_rng(3)
    scales = generator.standard_normal(ROWS * COLUMNS // kind.weights).astype(np.float16)
    if name in ("Q1_0", "TQ1_0"):
        raw = blocks(kind)
    else:
        digits = generator.integers(0, 3, (ROWS * COLUMNS // kind.weights, kind.weights)).astype(np.uint8)
        fields = digits.reshape(len(digits), -1, 4)
        if name == "TQ2_0":
            fields = digits.reshape(len(digits), 2, 4, 32).swapaxes(2, 3).reshape(len(digits), -1, 4)
        packed = (fields << np.array([0, 2, 4, 6], np.uint8)).sum(2).astype(np.uint8)
        scale = scales.view(np.uint8).reshape(-1, 2)
        raw = np.concatenate([packed, scale] if name == "TQ2_0" else [scale, packed], 1).reshape(ROWS, -1)
    tensor = stored(tmp_path / "t.gguf", kind, raw)
    code = Source("x.weight", (tensor,), coded=True).described().load()
    assert isinstance(code, Code)
    assert code.kind == ("binary-planes" if name == "Q1_0" else "trit-planes")
    assert np.array_equal(bits(code.decode()), bits(expected(kind, raw)))


@pytest.mark.parametrize("name", sorted(AFFINE | TERNARY | SIGNS))
def test_codes_run_packed(name: str, tmp_path: Path) -> None:
    """The product with the packed code, one token and several, is that with the decoded matrix."""
    code = Source("x.weight", (stored(tmp_path / "t.gguf", KINDS[name], blocks(KINDS[name])),), coded=True)
    found = code.described().load()
    assert isinstance(found, Code)
    matrix = found.decode()
    if name == "MXFP4":  # whose random exponents span what no sum can hold
        found = found.replaced({"scales": found.scales.float().clamp(1e-3, 1e3).bfloat16()})  # type: ignore[attr-defined]
        matrix = found.decode()
    packed = pack_code(found)
    for tokens in (1, 5):
        x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(tokens))
        y = apply_terms(x, packed.terms, None, ROWS, "float")
        exact, scale = x.double() @ matrix.double().T, x.double().abs() @ matrix.double().abs().T
        assert float(((y.double() - exact).abs() / scale).max()) < 1e-5


def test_every_type_has_a_way() -> None:
    """Each is a code, plain, or decoded by the package."""
    held = {*AFFINE, *TERNARY, *SIGNS, "F32", "F16", "BF16"}
    by_package = {kind.name for kind in Type}
    for kind in TYPES.values():
        assert kind.name in held | by_package
        if kind.name in by_package:
            assert (kind.weights, kind.bytes) == gguf.GGML_QUANT_SIZES[Type(kind.number)]


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    raw = blocks(KINDS["Q8_0"])
    raw[7, 34:36] = np.array([np.inf], np.float16).view(np.uint8)
    tensor = stored(tmp_path / "t.gguf", KINDS["Q8_0"], raw)
    with pytest.raises(CheckpointError, match="tensor 't' of .* has a scale that is no finite number"):
        Source("x.weight", (tensor,), coded=True).described().load()


def test_planes_must_be_trits(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "t.gguf", KINDS["TQ2_0"], blocks(KINDS["TQ2_0"]))
    with pytest.raises(CheckpointError, match="a plane of 't' has a digit that is no trit"):
        Source("x.weight", (tensor, tensor), coded=True).described()
