"""The architectures that the native decoder runs, as data: names of weights, what a config means where it is silent.

All are decoders of the llama kind (Touvron et al., arXiv:2302.13971): RMSNorm before attention and SwiGLU, rotary
positions, grouped-query attention. A further one is a further `Architecture` in ARCHITECTURES, as long as its blocks
compute this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from featherweight.errors import CheckpointError

Config = Mapping[str, Any]


class UnsupportedModelError(CheckpointError):
    """The native decoder does not compute this kind of model; transformers may."""


def _no_biases(config: Config) -> frozenset[str]:
    return frozenset()


def _llama_biases(config: Config) -> frozenset[str]:
    """`attention_bias` asks for one behind each matrix of the attention, `mlp_bias` of the MLP."""
    attention = {"query", "key", "value", "output"} if config.get("attention_bias") else set()
    return frozenset(attention | ({"gate", "up", "down"} if config.get("mlp_bias") else set()))


def _qwen2_biases(config: Config) -> frozenset[str]:
    return frozenset(("query", "key", "value"))


def _qwen3_biases(config: Config) -> frozenset[str]:
    return frozenset(("query", "key", "value", "output") if config.get("attention_bias") else ())


def _no_window(config: Config, layer: int) -> int:
    """The architecture has none; but whoever asks for one gets it from transformers, whose cache keeps no more."""
    kinds = config.get("layer_types") or []
    if config["sliding_window"] or not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedModelError(
            "sliding_window or layer_types in config.json asks for windows this architecture lacks"
        )
    return 0


def _mistral_window(config: Config, layer: int) -> int:
    return config["sliding_window"] or 0


def _qwen_window(config: Config, layer: int) -> int:
    """Layers from `max_window_layers` on, unless the config lists the kind of each layer."""
    if not config["use_sliding_window"]:
        return 0
    kinds = config.get("layer_types")
    if kinds is None:
        if config["max_window_layers"] is None:
            raise UnsupportedModelError("max_window_layers in config.json is null, and windows are asked for")
        slides = layer >= config["max_window_layers"]
    elif isinstance(kinds, list) and len(kinds) == config["num_hidden_layers"]:
        slides = kinds[layer] == "sliding_attention"
    else:
        raise CheckpointError("layer_types in config.json does not name a kind of attention for every layer")
    return (config["sliding_window"] or 0) if slides else 0


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes
    ----------
    model_type, name : as config.json names them, its `model_type` and `architectures`.
    defaults : values of settings that config.json may leave out.
    head_norms : whether queries and keys have an RMSNorm for every head.
    biased : config with defaults -> roles of the matrices that have a bias.
    window : (config with defaults, layer) -> tokens that a token sees, itself included; 0 for all.
    embedding, norm, head, block : modules; `block` has the layer's number in it.
    parts : modules within a block by role.
    """

    model_type: str
    name: str
    defaults: Mapping[str, Any]
    head_norms: bool = False
    biased: Callable[[Config], frozenset[str]] = _no_biases
    window: Callable[[Config, int], int] = _no_window
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    block: str = "model.layers.{layer}"
    parts: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention_norm": "input_layernorm",
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "output": "self_attn.o_proj",
            "query_norm": "self_attn.q_norm",
            "key_norm": "self_attn.k_norm",
            "mlp_norm": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    )


COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
LLAMA = Architecture("llama", "LlamaForCausalLM", COMMON | {"sliding_window": None}, biased=_llama_biases)
MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    window=_mistral_window,
)
QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    COMMON | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    biased=_qwen2_biases,
    window=_qwen_window,
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    COMMON | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    head_norms=True,
    biased=_qwen3_biases,
    window=_qwen_window,
)
ARCHITECTURES = {one.model_type: one for one in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config.json; UnsupportedModelError where it is none of these, or no language model."""
    kind = config.get("model_type")
    found = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"the native decoder does not know the model type {str(kind)[:80]!r}, only {', '.join(ARCHITECTURES)}"
        )
    named = config.get("architectures") or [found.name]
    if not isinstance(named, list) or named[0] != found.name:
        raise UnsupportedModelError(f"the native decoder runs {found.name}, and this model is {repr(named)[:80]}")
    return found
