"""Whether transformers will be able to load what a data-free recipe writes: such a recipe needs no config.json to work.

Asking transformers means importing it, which takes seconds and memory that a data-free run does without, so it is only
asked where config.json has something unusual in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.transformers_calls import asking_transformers

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "d_model", "num_layers", "num_heads"),
)
WHOLE = (
    *SIZES,
    *("num_key_value_heads", "head_dim", "sliding_window", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("bos_token_id", "pad_token_id", "max_window_layers", "moe_intermediate_size", "original_max_position_embeddings"),
)
NUMBERS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta", "attention_dropout"),
    *("factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
)
FLAGS = ("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias", "use_sliding_window", "scale_embedding")
OBJECTS = ("rope_scaling", "rope_parameters", "text_config")
DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def loading_note(checkpoint: Checkpoint) -> str | None:
    """What is to be said where transformers refuses the config.json; None where it does not, or all looks usual."""
    config = checkpoint.config
    if not config or not any(_unusual(name, value) for name, value in _entries(config)):
        return None
    import transformers

    try:
        with asking_transformers("read this config.json"):
            transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except CheckpointError as error:
        return (
            f"{error}; what is written has the same config.json, so transformers {transformers.__version__} will not "
            "load it before that is corrected"
        )
    return None


def _entries(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values, those of objects within too."""
    found = list(config.items())
    for name in OBJECTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            found += _entries(part)
    return found


def _unusual(name: str, value: Any) -> bool:
    if value is None:
        return name in FLAGS or name in ("rms_norm_eps", *SIZES)
    flag = isinstance(value, bool)
    if name in WHOLE:
        return flag or not isinstance(value, int) or value < (1 if name in SIZES else -1)
    if name in NUMBERS:
        return flag or not isinstance(value, int | float)
    if name in FLAGS:
        return not flag
    if name in OBJECTS:
        return not isinstance(value, Mapping)
    if name in ("dtype", "torch_dtype"):
        return value not in DTYPES
    if name in ("rope_type", "type"):
        return value not in KINDS
    return name in ("model_type", "hidden_act", "hidden_activation") and not isinstance(value, str)
