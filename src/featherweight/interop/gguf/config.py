"""config.json of a model in GGUF, from its metadata and from which tensors it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.file import GGUFModel
from featherweight.interop.gguf.names import EMBEDDING, FAMILIES, HEAD, Family
from featherweight.interop.gguf.rope import factors_of, rope_scaling

NO_MODEL = {
    "mmproj": "the part of a model that reads pictures or sound: give the language model's file",
    "adapter": "an adapter, not a model: merge it into its base first",
    "imatrix": "a file of importances, not a model: give the model's file",
}
"""What `general.type` may say beside "model"."""
FOREIGN = {
    "expert_count": "a mixture of experts",
    "attention.clamp_kqv": "clamped queries and keys",
    "attention.max_alibi_bias": "biases in place of rotary positions",
    "logit_scale": "scaled logits",
    "residual_scale": "scaled residuals",
    "embedding_scale": "scaled embeddings",
    "attention.temperature_scale": "queries scaled by their position",
}
"""Settings that change what is computed in a way that these families do not know."""
MOST_LAYERS = 1 << 16


class Settings:
    """Metadata of a model, asked for by name with its kind."""

    def __init__(self, model: GGUFModel) -> None:
        self.path, self.metadata = model.path, model.metadata
        self.architecture = self.text("general.architecture")

    def text(self, key: str) -> str:
        found = self.metadata.get(key)
        if not isinstance(found, str):
            raise self.odd(key, "text")
        return found

    def whole(self, key: str, default: int | None = None, low: int = 1) -> int:
        """A whole number of the architecture; arrays of equal numbers, one a block, stand for one."""
        found = self._own(key, default)
        if type(found) is not int or not low <= found < 1 << 31:
            raise self.odd(f"{self.architecture}.{key}", "a positive whole number")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A number of the architecture, the shortest that is the same float32."""
        found = self._own(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.odd(f"{self.architecture}.{key}", "a number")
        return shortest(found)

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def odd(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is missing or makes no sense."""
        if key not in self.metadata:
            return CheckpointError(f"the metadata of {self.path} lacks {key}: convert the model again")
        return CheckpointError(f"the metadata of {self.path} has {shown(self.metadata[key])} for {key}, not {expected}")

    def _own(self, key: str, default: float | None) -> Any:
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(found, np.ndarray) and found.size and bool((found == found[0]).all()):
            return found[0].item()
        if isinstance(found, np.ndarray):
            raise CheckpointError(
                f"the metadata of {self.path} has a value for each block in {self.architecture}.{key}, and this "
                "release reads models whose blocks are alike"
            )
        return found


def shortest(value: float) -> float:
    """The shortest decimal number that is the same float32, as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def family_of(model: GGUFModel) -> Family:
    """The family of the model. CheckpointError where it is none of ours, or no language model at all."""
    kind, metadata = model.metadata.get("general.type", "model"), model.metadata
    if kind in NO_MODEL or metadata.get("general.architecture") == "clip":
        raise CheckpointError(f"{model.path} is {NO_MODEL.get(kind, NO_MODEL['mmproj'])}")
    architecture = Settings(model).architecture
    family = FAMILIES.get(architecture)
    if family is None:
        raise CheckpointError(
            f"{model.path} is a model of the architecture {shown(architecture)}, and GGUF files of "
            f"{', '.join(FAMILIES)} are read: give the model that it was made from, as a folder"
        )
    if not model.tensors:
        raise CheckpointError(f"{model.path} has a vocabulary and no weights: give the file of the model itself")
    return family


def config_of(model: GGUFModel, family: Family) -> dict[str, Any]:
    """Content of config.json. CheckpointError where the metadata lacks something or makes no sense."""
    settings = Settings(model)
    for key, what in FOREIGN.items():
        if settings.metadata.get(f"{settings.architecture}.{key}"):
            raise CheckpointError(
                f"{model.path} has {what} ({settings.architecture}.{key}), which this release cannot read"
            )
    hidden, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    head_dim = _head_dim(settings, hidden, heads)
    embedding = model.tensors.get(EMBEDDING)
    vocabulary = settings.whole("vocab_size", _tokens(settings)) if embedding is None else embedding.info.shape[0]
    layers, keys = settings.whole("block_count"), settings.whole("attention.head_count_kv", heads)
    if layers > MOST_LAYERS or heads % keys or head_dim % 2:
        raise CheckpointError(
            f"the metadata of {model.path} asks for {layers} blocks of {heads} heads of {head_dim} and {keys} key "
            "heads, which do not fit"
        )
    config: dict[str, Any] = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": settings.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": settings.whole("context_length"),
        "rms_norm_eps": settings.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": HEAD not in model.tensors,
        "torch_dtype": _compute_dtype(model),
        **_special_tokens(settings, vocabulary),
    }
    for flag, parts in family.optional.items():
        config[flag] = any(f"blk.0.{part}" in model.tensors for part in parts)
    MORE[settings.architecture](settings, model, config)
    return config


def _head_dim(settings: Settings, hidden: int, heads: int) -> int:
    found = settings.whole("attention.key_length", max(1, hidden // heads))
    if settings.whole("attention.value_length", found) != found:
        raise CheckpointError(f"{settings.path} has heads of keys and of values that differ in size, which is not read")
    return found


def _tokens(settings: Settings) -> int:
    return len(settings.metadata.get("tokenizer.ggml.tokens", ()))


def _compute_dtype(model: GGUFModel) -> str:
    """What the matrices are stored in, where that is plain, and else what most models of these families have."""
    kinds = {tensor.info.type.name for tensor in model.tensors.values() if len(tensor.info.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get("".join(kinds), "bfloat16")


def _special_tokens(settings: Settings, vocabulary: int) -> dict[str, int]:
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = settings.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int and 0 <= token < vocabulary:
            found[f"{name}_token_id"] = token
    return found


def _rotated(settings: Settings, config: dict[str, Any]) -> int:
    """Columns of a head that rotate."""
    return settings.whole("rope.dimension_count", config["head_dim"])


def _whole_heads(settings: Settings, config: dict[str, Any]) -> None:
    if _rotated(settings, config) != config["head_dim"]:
        raise CheckpointError(
            f"{settings.path} rotates {_rotated(settings, config)} of the {config['head_dim']} columns of a head, "
            f"which a {settings.architecture} model as this release knows it does not"
        )


def _plain(settings: Settings, model: GGUFModel, config: dict[str, Any]) -> None:
    """llama and qwen: rotary positions over whole heads."""
    _whole_heads(settings, config)
    if settings.architecture == "llama" and settings.has("attention.sliding_window"):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = settings.whole("attention.sliding_window")
        if config.pop("attention_bias", False) or config.pop("mlp_bias", False):
            raise CheckpointError(f"{settings.path} has both windows and biases, which is not read")
    _scale(settings, config, factors_of(model, "rope_freqs.weight", config["head_dim"] // 2))


def _scale(settings: Settings, config: dict[str, Any], factors: Any = None) -> None:
    key = f"{settings.architecture}.rope.scaling.type"
    scaling = rope_scaling(settings, config, factors, settings.text(key) if key in settings.metadata else "none")
    if scaling is not None:
        config["rope_scaling"] = scaling


def _gemma(settings: Settings, model: GGUFModel, config: dict[str, Any]) -> None:
    _whole_heads(settings, config)
    config |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    _scale(settings, config)


def _gemma2(settings: Settings, model: GGUFModel, config: dict[str, Any]) -> None:
    """The scale of attention does not stand in the file: it is that of heads, but for the largest model."""
    _gemma(settings, model, config)
    config["sliding_window"] = settings.whole("attention.sliding_window", 4096)
    config["attn_logit_softcapping"] = settings.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = settings.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _query_scale(settings, config, 46)


def _gemma3(settings: Settings, model: GGUFModel, config: dict[str, Any]) -> None:
    """Every sixth block sees all, the others a window, with positions of their own that nothing stretches."""
    _gemma(settings, model, config)
    pattern = settings.whole("attention.sliding_window_pattern", 6)
    config["sliding_window"] = settings.whole("attention.sliding_window", 1024)
    config["sliding_window_pattern"] = pattern
    config["layer_types"] = [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    config["rope_theta"] = settings.real("rope.freq_base", 1_000_000.0)
    config["rope_local_base_freq"] = settings.real("rope.freq_base_swa", 10_000.0)
    config["attn_logit_softcapping"] = None
    config["final_logit_softcapping"] = (
        settings.real("final_logit_softcapping") if settings.has("final_logit_softcapping") else None
    )
    config["query_pre_attn_scalar"] = _query_scale(settings, config, 62)


def _query_scale(settings: Settings, config: Mapping[str, Any], largest: int) -> int:
    """s of queries that are divided by sqrt(s); the models of 27 B, known by their blocks, have hidden / heads."""
    if settings.has("attention.scale"):
        return round(settings.real("attention.scale") ** -2)
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(settings: Settings, model: GGUFModel, config: dict[str, Any]) -> None:
    rotated = _rotated(settings, config)
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise CheckpointError(f"{settings.path} has heads that do not fill its hidden size, which phi3 models do")
    if settings.metadata.get("phi3.attention.sliding_window"):
        config["sliding_window"] = settings.whole("attention.sliding_window")
    config["original_max_position_embeddings"] = settings.whole(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    config["pad_token_id"] = config.get("pad_token_id")  # the class's own default may lie outside the vocabulary
    long, short = (factors_of(model, f"rope_factors_{name}.weight", rotated // 2) for name in ("long", "short"))
    _scale(settings, config, None if long is None or short is None else (long, short))


MORE: dict[str, Callable[[Settings, GGUFModel, dict[str, Any]], None]] = {
    "llama": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
"""What each architecture has beyond the common part."""
