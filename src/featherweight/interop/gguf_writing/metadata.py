"""Keys of a GGUF file that say how a model is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf

from featherweight.errors import CheckpointError
from featherweight.interop.gguf_writing.architecture import Architecture, head_dim, rope_of

SCALING = {
    "linear": gguf.RopeScalingType.LINEAR,
    "yarn": gguf.RopeScalingType.YARN,
    "longrope": gguf.RopeScalingType.LONGROPE,
    "su": gguf.RopeScalingType.LONGROPE,
}


def add_hyperparameters(writer: gguf.GGUFWriter, config: Mapping[str, Any], found: Architecture) -> None:
    """Shapes, norms, rotary positions, windows. CheckpointError where config.json lacks something."""
    try:
        _add_shapes(writer, config, found)
        _add_rope(writer, config, found)
        _add_window(writer, config, found)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json lacks what a GGUF of {found.name} says, or it makes no sense: {error!r}"
        ) from error


def _add_shapes(writer: gguf.GGUFWriter, config: Mapping[str, Any], found: Architecture) -> None:
    heads = int(config["num_attention_heads"])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    if config.get("head_dim") or found.shifted:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if found.shifted and config.get(key):
            add(float(config[key]))


def _add_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any], found: Architecture) -> None:
    settings = rope_of(config)
    rotated = float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    writer.add_rope_dimension_count(int(head_dim(config) * rotated))
    writer.add_rope_freq_base(float(settings["rope_theta"]))
    if found.name == "gemma3":
        writer.add_rope_freq_base_swa(float(rope_of(config, "sliding_attention")["rope_theta"]))
    kind = settings["rope_type"]
    context = int(config["max_position_embeddings"])
    original = int(
        settings.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or context
    )
    if found.name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind not in SCALING:
        return
    writer.add_rope_scaling_type(SCALING[kind])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(float(settings["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if settings.get(key) is not None:
                add(float(settings[key]))
    if kind in ("longrope", "su"):
        stretch = context / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_attn_factors(float(settings.get("attention_factor") or factor))


def _add_window(writer: gguf.GGUFWriter, config: Mapping[str, Any], found: Architecture) -> None:
    """The sliding window, and which layers have it: all but every 6th of gemma3 and every 2nd of gemma2 unless the
    layers are named otherwise."""
    if found.name == "phi3":
        writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if found.name not in ("gemma2", "gemma3") or not config.get("sliding_window"):
        return
    writer.add_sliding_window(int(config["sliding_window"]))
    kinds = config.get("layer_types")
    usual = 2 if found.name == "gemma2" else 6
    if kinds and [kind == "full_attention" for kind in kinds] != [(i + 1) % usual == 0 for i in range(len(kinds))]:
        writer.add_sliding_window_pattern([kind != "full_attention" for kind in kinds])
