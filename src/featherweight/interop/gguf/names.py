"""Names and shapes of the tensors in GGUF files, and those that the Hugging Face family has for them.

What differs beside names: llama.cpp has rows of queries and keys of the architecture llama in another order (pairs
that rotate together are neighbours), and gemma's norms with the 1 added that transformers adds when it computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.file import GGUFModel, Stored
from featherweight.interop.gguf.tensors import Order, Source

Sides = tuple[str, ...]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""The second may be absent: then it is the first."""
OUTSIDE: dict[str, tuple[str, Sides]] = {
    EMBEDDING: ("model.embed_tokens.weight", ("vocabulary", "hidden")),
    "output_norm.weight": ("model.norm.weight", ("hidden",)),
    HEAD: ("lm_head.weight", ("vocabulary", "hidden")),
}
ATTENTION: dict[str, tuple[str, Sides]] = {
    "attn_norm.weight": ("input_layernorm.weight", ("hidden",)),
    "attn_q.weight": ("self_attn.q_proj.weight", ("queries", "hidden")),
    "attn_k.weight": ("self_attn.k_proj.weight", ("keys", "hidden")),
    "attn_v.weight": ("self_attn.v_proj.weight", ("keys", "hidden")),
    "attn_output.weight": ("self_attn.o_proj.weight", ("hidden", "queries")),
}
GATED: dict[str, tuple[str, Sides]] = {
    "ffn_gate.weight": ("mlp.gate_proj.weight", ("ffn", "hidden")),
    "ffn_up.weight": ("mlp.up_proj.weight", ("ffn", "hidden")),
    "ffn_down.weight": ("mlp.down_proj.weight", ("hidden", "ffn")),
}
MLP = {"ffn_norm.weight": ("post_attention_layernorm.weight", ("hidden",))} | GATED
HEAD_NORMS: dict[str, tuple[str, Sides]] = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", ("head",)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", ("head",)),
}
NORMS_ON_BOTH_SIDES: dict[str, tuple[str, Sides]] = {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", ("hidden",)),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", ("hidden",)),
}
FUSED: dict[str, tuple[str, Sides]] = {
    "attn_norm.weight": ("input_layernorm.weight", ("hidden",)),
    "attn_qkv.weight": ("self_attn.qkv_proj.weight", ("queries_and_keys", "hidden")),
    "attn_output.weight": ("self_attn.o_proj.weight", ("hidden", "queries")),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("hidden",)),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", ("gate_and_up", "hidden")),
    "ffn_down.weight": ("mlp.down_proj.weight", ("hidden", "ffn")),
}
BIASED = ("attn_q", "attn_k", "attn_v")


def _biases(parts: tuple[str, ...], block: Mapping[str, tuple[str, Sides]]) -> dict[str, tuple[str, Sides]]:
    found = {}
    for part in parts:
        name, sides = block[f"{part}.weight"]
        found[f"{part}.bias"] = (name.removesuffix("weight") + "bias", sides[:1])
    return found


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF files.

    model_type, name : as config.json has them, its `model_type` and `architectures`
    block : by the name within a block: that within a block of the family, and its sides
    optional : the same of what all blocks have where a flag of the config is set
    paired : rows of queries and keys are stored with rotating pairs side by side
    norm_offset : what norms are stored with on top
    """

    model_type: str
    name: str
    block: Mapping[str, tuple[str, Sides]]
    optional: Mapping[str, Mapping[str, tuple[str, Sides]]] = field(default_factory=dict)
    paired: bool = False
    norm_offset: float = 0.0


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        ATTENTION | MLP,
        {
            "attention_bias": _biases((*BIASED, "attn_output"), ATTENTION),
            "mlp_bias": _biases(("ffn_gate", "ffn_up", "ffn_down"), GATED),
        },
        paired=True,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", ATTENTION | _biases(BIASED, ATTENTION) | MLP),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        ATTENTION | HEAD_NORMS | MLP,
        {"attention_bias": _biases((*BIASED, "attn_output"), ATTENTION)},
    ),
    "gemma": Family("gemma", "GemmaForCausalLM", ATTENTION | MLP, norm_offset=1.0),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", ATTENTION | NORMS_ON_BOTH_SIDES | GATED, norm_offset=1.0),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        ATTENTION | HEAD_NORMS | NORMS_ON_BOTH_SIDES | GATED,
        norm_offset=1.0,
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", FUSED),
}
"""By what `general.architecture` says. Mistral's models say llama, as they compute the same."""

IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that a config has as numbers."""
REDUNDANT = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
"""Frequencies that very old files have although they follow from the metadata."""
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
PLANE = re.compile(r"(.+)\.ptqtp([0-2])")
"""Trit-planes of one matrix as tensors beside each other."""


def sources(model: GGUFModel, family: Family, config: Mapping[str, Any]) -> list[Source]:
    """All tensors of the model in an order of blocks. CheckpointError where one is missing, too many, or of a shape
    that the metadata does not say."""
    stored = _matrices(model)
    expected = _expected(family, config, stored)
    _check_names(model, stored, expected)
    sides = _sides(config)
    found = []
    for name, (target, asked) in expected.items():
        planes = stored[name]
        shape = tuple(sides[side] for side in asked)
        if any(plane.info.shape != shape for plane in planes):
            wrong = next(plane.info for plane in planes if plane.info.shape != shape)
            raise CheckpointError(
                f"{model.path} has {shown(name)} of shape {list(wrong.shape)}, and its metadata asks for {list(shape)}"
            )
        norm = len(shape) == 1 and target.endswith("norm.weight")
        order = None
        if family.paired and re.search(r"\.attn_[qk]\.", name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            order = halves(shape[0], heads)
        found.append(Source(target, planes, order, family.norm_offset if norm else 0.0, coded=len(shape) == 2))
    return found


def halves(rows: int, heads: int) -> Order:
    """For each row of the family its row in the file: within a head the first of all pairs, then the second of all."""
    order: Order = np.arange(rows, dtype=np.int64).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return order


def _matrices(model: GGUFModel) -> dict[str, tuple[Stored, ...]]:
    """Stored tensors by the name of their matrix; several where planes lie beside each other."""
    found: dict[str, dict[int, Stored]] = {}
    for name, tensor in model.tensors.items():
        if name in IN_CONFIG or REDUNDANT.fullmatch(name):
            continue
        plane = PLANE.fullmatch(name)
        found.setdefault(plane[1] if plane else name, {})[int(plane[2]) if plane else -1] = tensor
    for name, planes in found.items():
        numbers = sorted(planes)
        if numbers not in ([-1], [0], [0, 1], [0, 1, 2]) or any(
            number >= 0 and tensor.info.type.name != "TQ2_0" for number, tensor in planes.items()
        ):
            raise CheckpointError(f"{model.path} has {shown(name)} in planes that do not belong together")
    return {name: tuple(planes[number] for number in sorted(planes)) for name, planes in found.items()}


def _expected(family: Family, config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, tuple[str, Sides]]:
    """What the model has, by the file's names, in the order of its blocks."""
    outside = {name: value for name, value in OUTSIDE.items() if name != HEAD or name in stored}
    parts = dict(family.block)
    for flag, more in family.optional.items():
        parts |= more if config.get(flag) else {}
    found = {EMBEDDING: outside.pop(EMBEDDING)}
    for number in range(config["num_hidden_layers"]):
        for part, (target, asked) in parts.items():
            found[f"blk.{number}.{part}"] = (f"model.layers.{number}.{target}", asked)
    return found | outside


def _check_names(model: GGUFModel, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    architecture = model.metadata["general.architecture"]
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{model.path} lacks the tensor {missing[0]}{more} of a {architecture} model: download it again, or "
            "convert the model again"
        )
    unknown = [name for name in stored if name not in expected]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{model.path} has the tensor {shown(unknown[0])}{more}, which a {architecture} model as this release "
            "knows it does not have"
        )


def _sides(config: Mapping[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "queries": queries,
        "keys": keys,
        "queries_and_keys": queries + 2 * keys,
        "head": head,
        "ffn": config["intermediate_size"],
        "gate_and_up": 2 * config["intermediate_size"],
    }
