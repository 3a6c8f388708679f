"""What the native decoder must know of a network beside its weights, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.model.decoder.architectures import Architecture, UnsupportedModelError, architecture_of
from featherweight.model.decoder.rope import Rope, rope_of

FOREIGN = ("attn_logit_softcapping", "final_logit_softcapping", "num_local_experts", "num_experts", "n_routed_experts")
"""Settings that would change the computation in a way that the decoder does not know."""
MOST_LAYERS = 1 << 16
FLAGS = ("tie_word_embeddings", "use_sliding_window")


@dataclass(frozen=True, eq=False)
class Network:
    """Sizes as in config.json.

    tied: head = embedding, unless another one is stored; biased: roles of the matrices that have a bias;
    windows: per layer, tokens that a token sees, 0 for all
    """

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    epsilon: float
    tied: bool
    biased: frozenset[str]
    windows: tuple[int, ...]
    rope: Rope

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of a block's matrices by role."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "query": (queries, self.hidden),
            "key": (keys, self.hidden),
            "value": (keys, self.hidden),
            "output": (self.hidden, queries),
            "gate": (self.ffn, self.hidden),
            "up": (self.ffn, self.hidden),
            "down": (self.hidden, self.ffn),
        }


def network_of(config: Mapping[str, Any]) -> Network:
    """Read a config.json.

    Numbers are numbers and flags are flags: what else may stand there ("512", 512.0, null, "false") means something
    different to each version of transformers, or nothing, so that is left to it.

    Raises
    ------
    UnsupportedModelError
        the native decoder does not compute this model, or leaves it to transformers what it is.
    CheckpointError
        a setting makes no sense.
    """
    architecture = architecture_of(config)
    config = {**architecture.defaults, **config}
    for name in FOREIGN:
        if config.get(name):
            raise UnsupportedModelError(f"the native decoder does not know what {name} in config.json asks for")
    for name in FLAGS:
        if not isinstance(config[name], bool):
            raise _odd(config, name, "true or false")
    if config["hidden_act"] not in ("silu", "swish"):
        given = str(config["hidden_act"])[:40]
        raise UnsupportedModelError(f"the native decoder has the activation silu, not {given!r}")
    hidden, heads, layers = (_size(config, n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if layers > MOST_LAYERS:
        raise CheckpointError(f"num_hidden_layers in config.json is {layers}, and no model has so many")
    kv_heads = heads if config["num_key_value_heads"] is None else _size(config, "num_key_value_heads")
    head_dim = hidden // heads if config["head_dim"] is None else _size(config, "head_dim")
    if head_dim < 2 or head_dim % 2 or heads % kv_heads:
        raise CheckpointError(
            f"config.json asks for {heads} heads of {head_dim} and {kv_heads} key heads, which do not fit"
        )
    context = _size(config, "max_position_embeddings")
    return Network(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_size(config, "intermediate_size"),
        vocabulary=_size(config, "vocab_size"),
        context=context,
        epsilon=_epsilon(config),
        tied=bool(config["tie_word_embeddings"]),
        biased=architecture.biased(config),
        windows=tuple(_window(architecture, config, layer) for layer in range(layers)),
        rope=rope_of(config, head_dim, context),
    )


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise _odd(config, name, "a positive whole number")
    return value


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config["rms_norm_eps"]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise _odd(config, "rms_norm_eps", "a small positive number")
    return float(value)


def _window(architecture: Architecture, config: Mapping[str, Any], layer: int) -> int:
    for name in ("sliding_window", "max_window_layers"):
        value = config[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31):
            raise _odd(config, name, "a whole number")
    if config["sliding_window"] == 0:  # transformers takes it at its word, and no token sees any
        raise _odd(config, "sliding_window", "a positive whole number or null")
    return architecture.window(config, layer)


def _odd(config: Mapping[str, Any], name: str, expected: str) -> UnsupportedModelError:
    value = config.get(name)
    shown = str(value) if isinstance(value, str | int | float | None) else repr(value)
    return UnsupportedModelError(f"{name} in config.json is {shown[:40]!r}, and the native decoder expects {expected}")
