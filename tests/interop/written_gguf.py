"""Models of transformers as GGUF files, written by the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
TypeOf = Callable[[str], Type]


def write_model(model: Any, path: Path, type_of: TypeOf = lambda name: Type.F32, **more: Any) -> dict[str, Any]:
    """Write a model; returns its tensors as numpy decodes what was written, by their names in transformers.

    type_of : type of a matrix by its name in the file
    more : `metadata`, further pairs; `tokens`, False to leave the vocabulary out; `splits`, tensors a part; `left_out`,
        names in the file
    """
    kind = ARCHITECTURES[model.config.model_type]
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    splits = more.get("splits", 0)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind], split_max_tensors=splits)
    add_settings(writer, model.config)
    if more.get("tokens", True):
        add_tokens(writer, model.config.vocab_size)
    for key, value in more.get("metadata", {}).items():
        add_pair(writer, key, value)
    decoded = {}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        if target in more.get("left_out", ()):
            continue
        values = tensor.detach().float()
        shift = 1.0 if "GEMMA" in kind.name and name.endswith("norm.weight") else 0.0
        heads = heads_of(model.config, name) if kind == gguf.MODEL_ARCH.LLAMA else 0
        stored = (paired(values, heads) if heads else values + shift).numpy()
        dtype = type_of(target) if stored.ndim > 1 else Type.F32
        raw = gguf.quantize(np.ascontiguousarray(stored), dtype)
        writer.add_tensor(target, raw, raw_dtype=dtype)
        found = torch.from_numpy(np.array(gguf.dequantize(raw, dtype), np.float32))
        decoded[name] = halved(found, heads) if heads else found - shift
    for name, values in more.get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def heads_of(config: Any, name: str) -> int:
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)


def paired(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (or a bias) with rotating pairs side by side."""
    return values.view(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def halved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Back."""
    return values.view(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    if config.model_type in ("mistral", "gemma2", "gemma3_text") or (
        config.model_type == "phi3" and config.sliding_window
    ):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_tokens(writer: gguf.GGUFWriter, count: int) -> None:
    """A byte-level vocabulary: bytes, the rest padding."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *[f"[PAD{n}]" for n in range(256, count)]][:count]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [5] * (count - 256))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def add_pair(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        raise TypeError(key)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
