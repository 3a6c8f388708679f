"""What a GGUF file holds, told by the `gguf` package alone: an oracle that shares no code with the exporter."""

from __future__ import annotations

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
