"""Is a checkpoint the model that its config.json describes? What can be said from names, types and shapes alone.

The whole answer is the model class's (model/network/accounting.py asks transformers). Here is what needs no class:
tensors that show another kind of file (an unmerged adapter, codes of a quantiser that config.json does not name),
experts with gaps, and for families whose file lists all tensors (`whole`) whether they are exactly those, so that
nobody need be asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.family import find_family
from featherweight.storage.checkpoint.anatomy.tensor_index import FLOATING, Described, TensorIndex
from featherweight.storage.checkpoint.format import METHOD, module_specs

ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)(\.|$)")
CODES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|quant_map|nested_absmax|weight_(scale|zero_point)\w*"
    r"|weight\.(absmax|quant_map|quant_state\.\w+)|(input_|k_|v_)?scale(_inv)?|SCB)$"
)
EXPERT = re.compile(r"(?P<list>(?:.+\.)?[A-Za-z_]*experts)\.(?P<number>\d+)\.(?P<leaf>.+)")
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$")
"""Buffers that old checkpoints hold and every class computes by itself."""
SHOWN = 3
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
FEW_BLOCKS = 100  # so many are built in a moment, and what is missing is then told by name


@dataclass(frozen=True)
class Account:
    """What a model class makes of a checkpoint's tensors.

    missing : it asks for them and nothing is stored in their place
    unexpected : stored, and not used
    mismatched : (name, stored shape, wanted shape)
    asked : the class's name; empty where no class could be asked, which is said in `unknown`
    """

    asked: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unknown: str = ""


def refuse_other_kinds(checkpoint: TensorIndex, quantized: bool) -> None:
    """CheckpointError if names or types show that these are not a model's own weights.

    quantized : config.json names a method that makes the codes into weights
    """
    adapters = [name for name in checkpoint.names if ADAPTER.search(name)]
    if adapters:
        raise CheckpointError(
            f"{checkpoint.folder} holds an adapter that is not merged into its model ({some(adapters)}): merge it "
            "first (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(DIR))"
        )
    claimed = _claimed(checkpoint) if quantized else ()
    codes = [n for n in checkpoint.names if not n.startswith(claimed) and _holds_codes(n, checkpoint.entry(n))]
    codes.sort(key=lambda name: checkpoint.entry(name).dtype in FLOATING)  # the codes before their scales
    if codes:
        entry = checkpoint.entry(codes[0])
        raise CheckpointError(
            f"{checkpoint.folder} holds the codes of a quantised model ({some(codes)}, {entry.dtype}), but its "
            "config.json names no quantization_config that says what they mean: start from the original weights, or "
            "restore the config.json it was saved with"
        )


def _claimed(checkpoint: TensorIndex) -> tuple[str, ...]:
    """Beginnings of the names whose meaning config.json says: of the modules with a code of ours, else of all."""
    found = checkpoint.config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return ("",)
    return tuple(f"{module}." for module in module_specs(found))


def refuse_impossible_depth(checkpoint: TensorIndex) -> None:
    """CheckpointError if config.json asks for more blocks than there are tensors: whoever builds them would not end."""
    nested = [value for value in checkpoint.config.values() if isinstance(value, Mapping)]
    for holder in (checkpoint.config, *nested):
        for key in DEPTHS:
            depth = holder.get(key)
            if isinstance(depth, int | float) and depth > max(FEW_BLOCKS, len(checkpoint.names)):
                raise CheckpointError(
                    f"config.json of {checkpoint.folder} asks for {depth:.6g} blocks ({key}), and there are "
                    f"{len(checkpoint.names)} tensors: config.json and the weights do not belong together"
                )


def _holds_codes(name: str, entry: Described) -> bool:
    if entry.dtype in FLOATING or BUFFERS.search(name):
        return CODES.search(name) is not None and name.endswith((".weight_scale", ".weight_scale_inv", ".qzeros"))
    vector = name.endswith(".bias") and len(entry.shape) == 1
    if vector or name.endswith(".weight"):
        return True
    return entry.dtype != "BOOL" and CODES.search(name) is not None


def some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def expert_gaps(checkpoint: TensorIndex) -> list[str]:
    """Tensors that some experts of a list have and others lack, up to the number that config.json gives."""
    lists: dict[str, dict[str, set[int]]] = {}
    for name in checkpoint.names:
        match = EXPERT.fullmatch(name)
        if match:
            lists.setdefault(match["list"], {}).setdefault(match["leaf"], set()).add(int(match["number"]))
    gaps = []
    for prefix, leaves in lists.items():
        there = max(max(numbers) for numbers in leaves.values()) + 1
        for number in range(max(there, min(expert_count(checkpoint.config), 100_000))):
            gaps += [f"{prefix}.{number}.{leaf}" for leaf, numbers in leaves.items() if number not in numbers]
    return gaps


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a layer as config.json says; 0 where it does not."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            value = holder.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return 0


def missing_text(checkpoint: TensorIndex, missing: list[str]) -> str:
    """The refusal of an incomplete checkpoint."""
    return f"{checkpoint.folder} lacks {some(missing)}, which config.json asks for: download it again"


def is_whole(checkpoint: TensorIndex) -> bool:
    """Whether the tensors are exactly those that the family's file lists, with shapes that fit config.json.

    False says nothing: the family has no list, or config.json changes what there is, or the tensors differ.
    """
    family, config = find_family(checkpoint.config), checkpoint.config
    whole = family.whole if family else None
    if family is None or whole is None or any(config.get(key) for key in whole["unless"]):
        return False
    if architecture_of(config) not in whole["architectures"] or any(config.get(key) is None for key in whole["needs"]):
        return False
    tied = config.get("tie_word_embeddings", family.tied_by_default) is True
    try:
        wanted = _wanted(whole, config, tied)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False
    stored = {name for name in checkpoint.names if not BUFFERS.search(name)}
    if stored != wanted.keys():
        return False
    return all(
        checkpoint.entry(name).shape == wanted[name] and checkpoint.entry(name).dtype in FLOATING for name in stored
    )


def listed_missing(checkpoint: TensorIndex) -> list[str]:
    """Tensors that the family's file lists and the checkpoint lacks, for when no class can be asked: by names alone,
    without the head, which may be tied."""
    family = find_family(checkpoint.config)
    whole = family.whole if family else None
    layers = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layer"))
    if whole is None or architecture_of(checkpoint.config) not in whole["architectures"] or not isinstance(layers, int):
        return []
    wanted = list(whole["outside"])
    wanted += [f"{whole['blocks']}.{number}.{path}" for number in range(min(layers, 10_000)) for path in whole["block"]]
    stored = frozenset(checkpoint.names)
    return [name for name in wanted if name not in stored]


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that config.json names first; empty where it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _wanted(whole: Mapping[str, Any], config: Mapping[str, Any], tied: bool) -> dict[str, tuple[int, ...]]:
    sizes = _sizes(config)

    def shape(dims: Iterable[str]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[size] for size in dim.split("*")) for dim in dims)

    found = {name: shape(dims) for name, dims in whole["outside"].items()}
    if not tied:
        found |= {name: shape(dims) for name, dims in whole["head"].items()}
    for number in range(sizes["layers"]):
        found |= {f"{whole['blocks']}.{number}.{path}": shape(dims) for path, dims in whole["block"].items()}
    return found


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes a family's list is written in; KeyError, TypeError or ValueError where config.json leaves one open.

    vocabulary, hidden, layers, ffn, head (width of one), queries and keys (of all heads together), 3 and positions
    """

    def first(*keys: str) -> int:
        value = next(config[key] for key in keys if config.get(key) is not None)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise ValueError
        return value

    try:
        hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
        head = first("head_dim") if config.get("head_dim") is not None else hidden // heads
        keys = first("num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        layers = first("num_hidden_layers", "n_layer")
        given = any(config.get(key) is not None for key in ("intermediate_size", "n_inner"))
        ffn = first("intermediate_size", "n_inner") if given else 4 * hidden
        sizes = {"hidden": hidden, "head": head, "queries": heads * head, "keys": keys * head, "layers": layers}
        sizes |= {"ffn": ffn, "vocabulary": first("vocab_size"), "3": 3}
        return sizes | ({"positions": first("n_positions")} if "n_positions" in config else {})
    except StopIteration:
        raise KeyError from None
