"""What llama.cpp calls a model and its tensors, and what it computes otherwise than transformers.

Rows of queries and keys of `llama` are in another order, as it rotates neighbours where transformers rotates halves;
norms of gemma hold one more than in the checkpoint, as transformers adds it when it computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.interop.stored import StoredModel, StoredTensor

BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


@dataclass(frozen=True)
class Architecture:
    """name : `general.architecture`; permuted : rows of queries and keys; shifted : norms get one added; head : whether
    there is a place for an output layer of its own; activation : of the gated layer"""

    name: str
    kind: gguf.MODEL_ARCH
    permuted: bool = False
    shifted: bool = False
    head: bool = True
    activation: tuple[str, ...] = ("silu", "swish")


_GELU = ("gelu_pytorch_tanh", "gelu")
ARCHITECTURES = {
    "llama": Architecture("llama", gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Architecture("llama", gguf.MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Architecture("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture("qwen3", gguf.MODEL_ARCH.QWEN3),
    "gemma": Architecture("gemma", gguf.MODEL_ARCH.GEMMA, shifted=True, head=False, activation=_GELU),
    "gemma2": Architecture("gemma2", gguf.MODEL_ARCH.GEMMA2, shifted=True, head=False, activation=_GELU),
    "gemma3_text": Architecture("gemma3", gguf.MODEL_ARCH.GEMMA3, shifted=True, activation=_GELU),
    "phi3": Architecture("phi3", gguf.MODEL_ARCH.PHI3),
}
"""By the `model_type` of config.json."""


@dataclass(frozen=True)
class Placed:
    """A tensor's place in the file.

    name : there
    tensor : what is stored
    order : rows of it in the order of the file, or None as they are
    shift : added to all values
    """

    name: str
    tensor: StoredTensor
    order: Tensor | None = None
    shift: float = 0.0


def architecture_of(model: StoredModel) -> Architecture:
    """How llama.cpp computes a model. CheckpointError where it does not, or none of those that are written here."""
    config = model.config
    kind = config.get("model_type")
    found = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise CheckpointError(
            f"{model.folder} is a model of type {str(kind)[:40]!r}, for which there is no GGUF here: known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    _check(found, config, str(model.folder))
    return found


def _check(found: Architecture, config: Mapping[str, Any], folder: str) -> None:
    """CheckpointError for settings that llama.cpp computes otherwise."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or found.activation[0]
    if activation not in found.activation:
        raise CheckpointError(
            f"{folder} has the activation {str(activation)[:40]!r}; llama.cpp computes {found.name} with "
            f"{found.activation[0]}"
        )
    if found.name in ("gemma2", "gemma3"):
        large = config.get("num_hidden_layers") == (46 if found.name == "gemma2" else 62)
        taken = config["hidden_size"] // config["num_attention_heads"] if large else head_dim(config)
        asked = config.get("query_pre_attn_scalar", taken)
        if asked != taken:
            raise CheckpointError(
                f"{folder} divides attention by the root of query_pre_attn_scalar {asked}, llama.cpp by that of {taken}"
            )
    rope_type = str(rope_of(config).get("rope_type"))
    if rope_type not in ("default", "linear", "yarn", "llama3", "longrope", "su"):
        raise CheckpointError(f"{folder} has rotary positions of the kind {rope_type[:40]!r}, which GGUF lacks")


def head_dim(config: Mapping[str, Any]) -> int:
    """Columns of a head."""
    found = config.get("head_dim")
    return int(found) if found else int(config["hidden_size"]) // int(config["num_attention_heads"])


def rope_of(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Settings of rotary positions, of one kind of layer where they differ, in the manner of transformers 5."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    inner = found.get(layers)
    settings = dict(inner) if isinstance(inner, dict) else dict(found)
    base = config.get("rope_theta", 10000.0)
    settings.setdefault("rope_theta", base if layers == "full_attention" else config.get("rope_local_base_freq", base))
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def placed_tensors(model: StoredModel, found: Architecture) -> tuple[list[Placed], list[str]]:
    """All tensors with their places, in the order of the model, and names of those that have none."""
    blocks = int(model.config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(found.kind, blocks)
    placed, lost = [], []
    for name, tensor in model.tensors.items():
        if name.endswith(BUFFERS):
            continue
        full = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        place = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if full == "lm_head.weight" and not found.head:
            if not model.config.get("tie_word_embeddings", True):
                lost.append(name)
            continue
        if place is None:
            lost.append(name)
            continue
        shift = 1.0 if found.shifted and name.endswith("norm.weight") else 0.0
        placed.append(Placed(place, tensor, _order(full, tensor, model.config, found), shift))
    return placed, lost


def _order(name: str, tensor: StoredTensor, config: Mapping[str, Any], found: Architecture) -> Tensor | None:
    if not found.permuted:
        return None
    heads = int(config["num_attention_heads"])
    if ".self_attn.k_proj." in name:
        heads = int(config.get("num_key_value_heads") or heads)
    elif ".self_attn.q_proj." not in name:
        return None
    rows = torch.arange(tensor.shape[0])
    return rows.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def rope_factors(config: Mapping[str, Any], found: Architecture) -> dict[str, Tensor]:
    """Tensors that stretch rotary positions: of Llama 3.1's bands, and of long contexts of phi3. float32 [head / 2]."""
    settings = rope_of(config)
    if settings["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings, head_dim(config), config)}
    if found.name == "phi3" and settings.get("long_factor"):
        return {
            f"rope_factors_{kind}.weight": torch.tensor(settings[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _llama3_factors(settings: Mapping[str, Any], size: int, config: Mapping[str, Any]) -> Tensor:
    """By how much each wavelength is stretched: not at all up to context / high, by `factor` from context / low, and
    smoothly between."""
    factor, low, high = (float(settings[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(settings.get("original_max_position_embeddings") or config["max_position_embeddings"])
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    waves = 2 * math.pi * float(settings["rope_theta"]) ** exponents
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    stretched = torch.where(waves > context / low, factor, between)
    return torch.where(waves < context / high, 1.0, stretched).float()
