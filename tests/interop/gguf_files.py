"""What a GGUF file holds, told by the `gguf` package alone: an oracle that shares no code with the exporter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

QUERIES = ("q_proj", "k_proj")


def dequantised(tensor: Any) -> np.ndarray:
    """float32 values of a tensor of the reader, in the shape [rows, columns]."""
    shape = [int(n) for n in tensor.shape[::-1]]
    return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)


def tensors_of(path: Path) -> dict[str, Any]:
    return _opened(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _opened(path: Path, changed: int) -> dict[str, Any]:
    """Read once: the package takes its time for a vocabulary."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows as transformers has them: halves of each head, which llama.cpp keeps as neighbours."""
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(values.shape)


def place_of(name: str, kind: gguf.MODEL_ARCH, blocks: int = 8) -> str:
    """A tensor's name in the file."""
    found = gguf.get_tensor_name_map(kind, blocks).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def values_in(path: Path, name: str, config: dict[str, Any], kind: gguf.MODEL_ARCH) -> torch.Tensor:
    """Values of a tensor of the model, by its name there, as transformers would have them."""
    values = dequantised(tensors_of(path)[place_of(name, kind)])
    if kind == gguf.MODEL_ARCH.LLAMA and any(part in name for part in QUERIES):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        values = unpermuted(values, heads)
    if "GEMMA" in kind.name and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(values.copy())


@dataclass(frozen=True)
class Raw:
    kind: int
    shape: tuple[int, ...]
    data: bytes


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of values by their type's number; 8 is a string, 9 an array."""


def raw_tensor(path: Path, name: str) -> Raw:
    """A tensor of a file whose types the package may not know, from the format's own description; Q2_0 alone has its
    size worked out."""
    data, at = path.read_bytes(), 0

    def number(size: int) -> int:
        nonlocal at
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> str:
        nonlocal at
        length = number(8)
        at += length
        return data[at - length : at].decode()

    def skip(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                skip(inner)
        else:
            at += SIZES[kind]

    assert data[:4] == b"GGUF"
    at = 4
    assert number(4) == 3
    tensors, pairs = number(8), number(8)
    for _ in range(pairs):
        text()
        skip(number(4))
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        key, dimensions = text(), number(4)
        shape = tuple(number(8) for _ in range(dimensions))[::-1]
        found[key] = (number(4), shape, number(8))
    begin = -(-at // 32) * 32
    kind, shape, offset = found[name]
    assert kind == 42
    size = shape[0] * shape[1] // 64 * 18
    return Raw(kind, shape, data[begin + offset : begin + offset + size])
