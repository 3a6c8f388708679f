"""Attentions of transformers whose operands are rounded, and whose queries and keys may be one product (QKR).

The modules stay what they are. They choose among attention functions by the name in their configuration; a function of
ours stands there under a name of its own, and finds what it rounds by in the module.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.train.inputs import RoundedInput
from featherweight.methods.train.layer import Choices
from featherweight.methods.train.query_key import QueryKeyProduct
from featherweight.model.network.query_blocks import attention_globals

NAME = "featherweight-low-bit"
HELD = "low_bit_attention"
"""Attribute of a module of attention."""
QUERIES, KEYS = ("q_proj", "query"), ("k_proj", "key")
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim")
STRANGE = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models give their attention function, which this one does not know."""


class LowBitAttention(nn.Module):
    """What is rounded in an attention.

    query_key : the product in the place of queries and keys, or None
    operands : how query, key, value and probabilities are rounded, those that are
    """

    def __init__(self) -> None:
        super().__init__()
        self.query_key: QueryKeyProduct | None = None
        self.operands = nn.ModuleDict()

    def rounded(self, name: str, value: Tensor) -> Tensor:
        """Queries, keys or values [B, heads, N, d], whose channels are those of all heads; or probabilities."""
        if name not in self.operands:
            return value
        if name == "probabilities":
            found: Tensor = self.operands[name](value)
            return found
        joined: Tensor = self.operands[name](joined_heads(value))
        return split_heads(joined, value.shape[-1])


def joined_heads(value: Tensor) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads d]."""
    return value.transpose(1, 2).flatten(2)


def split_heads(value: Tensor, size: int) -> Tensor:
    """[B, N, heads d] -> [B, heads, N, d]."""
    return value.view(*value.shape[:-1], -1, size).transpose(1, 2)


def attentions(model: nn.Module) -> dict[str, Any]:
    """Modules of attention that choose among transformers' functions and are not changed yet, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if attention_globals(module)
        and not hasattr(module, HELD)
        and _child(module, QUERIES) is not None
        and _child(module, KEYS) is not None
    }


def low_bit_attentions(model: nn.Module) -> dict[str, LowBitAttention]:
    """What is rounded in attentions, by the name of the attention."""
    found = {name: getattr(module, HELD, None) for name, module in model.named_modules()}
    return {name: held for name, held in found.items() if isinstance(held, LowBitAttention)}


def check_attentions(model: nn.Module, found: dict[str, Any], product: bool) -> None:
    """FeatherError where attentions cannot be changed so."""
    kind = type(model).__name__
    if not found:
        raise FeatherError(
            f"{kind} has no attention whose function can be chosen: leave attention.inputs and attention.product out"
        )
    for name, module in found.items() if product else ():
        between = [child for child, _ in module.named_children() if "norm" in child]
        if _rotary(model, module) or between:
            what = "rotary positions" if not between else f"a norm ({between[0]})"
            raise FeatherError(
                f"{name} of {kind} has {what} between its projections and their product, which one matrix a head "
                "cannot stand for: set attention.product=false"
            )
        query, key = _child(module, QUERIES), _child(module, KEYS)
        size = head_size(module)
        if size is None or query.in_features != key.in_features or query.in_features % size:
            raise FeatherError(
                f"{name} of {kind} has queries and keys of {query.in_features} and {key.in_features} inputs, which are "
                "no whole number of heads: set attention.product=false"
            )


def change_attentions(found: dict[str, Any], choices: Choices, inputs: bool, products: set[str]) -> None:
    """Round operands, where `inputs`, of these attentions; those named in `products` multiply by one matrix a head."""
    for name, module in found.items():
        held = LowBitAttention()
        query, key = _child(module, QUERIES), _child(module, KEYS)
        if name in products:
            held.query_key = QueryKeyProduct(query, key, head_size(module), choices, f"{name}.{HELD}.query_key")
        if inputs:
            names = ("value", "probabilities") if name in products else ("query", "key", "value", "probabilities")
            for operand in names:
                held.operands[operand] = RoundedInput(
                    choices.activation, f"{name}.{HELD}.operands.{operand}", query.weight.device
                )
        module.add_module(HELD, held)
        attention_globals(module)["ALL_ATTENTION_FUNCTIONS"][NAME] = attend
        _know_masks()
        module.config._attn_implementation = NAME


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers: queries [B, heads, N, d], keys and values [B, key heads, M, d].

    Returns
    -------
    The output [B, N, heads, d], and probabilities [B, heads, N, M], rounded where they are.
    """
    strange = [name for name in STRANGE if rest.get(name) is not None]
    if strange:
        raise FeatherError(f"{type(module).__name__} gives its attention a {strange[0]}, which is not known here")
    held = getattr(module, HELD, None) or LowBitAttention()
    scaling = rest.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if held.query_key is not None:
        logits = held.query_key(joined_heads(query), joined_heads(key))
    else:
        query, key = held.rounded("query", query), held.rounded("key", key)
        logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    logits = logits * scaling
    value = held.rounded("value", value)
    value = value.repeat_interleave(logits.shape[1] // value.shape[1], 1)
    if attention_mask is not None:
        seen = attention_mask[..., : logits.shape[-1]]
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min) if seen.dtype == torch.bool else logits + seen
    chances = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    chances = held.rounded("probabilities", chances)
    kept = nn.functional.dropout(chances, p=rest.get("dropout") or 0.0, training=module.training)
    return (kept @ value).transpose(1, 2).contiguous(), chances


def head_size(module: Any) -> Any:
    """Channels of a head of an attention; None where it does not say."""
    return getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)


def _child(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The linear layer of one of these names, None without."""
    found = (module._modules.get(name) for name in names)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)


def _rotary(model: nn.Module, module: Any) -> bool:
    """Whether positions turn queries and keys."""
    configs = [module.config, getattr(model, "config", None)]
    said = any(getattr(config, name, None) for config in configs for name in ROTARY)
    return said or any(re.search("Rotary|Rope|RoPE", type(part).__name__) for part in model.modules())


def _know_masks() -> None:
    """Have masks made as for the plain function, added to logits; older versions do so for every unknown name."""
    try:
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
    except ImportError:
        return
    AttentionMaskInterface.register(NAME, eager_mask)
