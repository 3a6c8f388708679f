"""Attention received by tokens, without the probabilities of a whole sequence in memory.

The pitfall named for RSQ (arXiv 2503.01820): 4096 tokens and 32 heads are 2 GB of probabilities, of which only sums of
columns are wanted. A function of ours takes the place of the model's attention; it calls the model's own plain one (so
that soft caps, sinks and scalings are the model's) for one head and some queries at a time, adds up, and ends the
block there. Nothing else of a calibration needs plain attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.system.transformers_calls import Leaving

SCRATCH = 64 << 20  # bytes of the temporaries of a block of queries
COPIES = 5  # of a block's logits that are alive at once: product, scaled, masked, probabilities, the mask itself
NAME = "featherweight-token-weights"


class _Received(Leaving):
    """Ends a block's forward pass with what was wanted of it."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores


def in_query_blocks(model: nn.Module) -> bool:
    """Whether `attention_in_blocks` can do with a model or block: some module of it chooses among transformers'
    attention functions."""
    return any(_plain_attention(module) is not None for module in model.modules())


def attention_in_blocks(
    block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Attention received in the block's first attention, float32 [B, T]; None where it never gets that far."""
    with _attention_replaced(block):
        try:
            block(hidden, *args, **kwargs)
        except _Received as found:
            return found.scores
    return None


@contextmanager
def _attention_replaced(block: nn.Module) -> Iterator[None]:
    modules: list[Any] = [module for module in block.modules() if _plain_attention(module)]
    configs = {id(module.config): module.config for module in modules}
    functions = {id(found): found for found in (attention_globals(m)["ALL_ATTENTION_FUNCTIONS"] for m in modules)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for known in functions.values():
        known[NAME] = _receive
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for known in functions.values():
            del known[NAME]


def attention_globals(module: nn.Module) -> dict[str, Any]:
    """Those of a module's forward function, if that chooses among attention functions; else empty."""
    forward: Any = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    chooses = {"eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"} <= set(names) and hasattr(module, "config")
    found: dict[str, Any] = forward.__globals__ if chooses else {}
    return found


def _plain_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The plain attention function that a module falls back to, None if it is not of that kind."""
    return attention_globals(module).get("eager_attention_forward")


def _receive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **rest: Any
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers: query [B, heads, T, d], key and value [B, key heads, T, d]."""
    plain = _plain_attention(module)
    assert plain is not None
    batch, heads, tokens = query.shape[:3]
    keys, shared = key.shape[2], heads // key.shape[1]
    step = query_step(batch, keys, query.dtype)
    causal = rest.get("is_causal")
    causal = tokens > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
    scores = torch.zeros(batch, keys, dtype=torch.float64, device=query.device)
    for head in range(heads):
        one, of = _OneHead(module, head), slice(head // shared, head // shared + 1)
        for first in range(0, tokens, step):
            last = min(tokens, first + step)
            until = last if causal and attention_mask is None else keys  # later ones get nothing
            mask = _mask_of(attention_mask, head, slice(first, last), until, causal, query)
            some, seen = query[:, head : head + 1, first:last], key[:, of, :until]
            one_channel = value[:, of, :until, :1]  # of an output that nobody reads
            _, chances = plain(one, some, seen, one_channel, mask, *args, **rest)
            scores[:, :until] += chances[..., :until].sum((1, 2), dtype=torch.float32)
    raise _Received(scores.float())


def query_step(batch: int, keys: int, dtype: torch.dtype) -> int:
    """Queries at a time, so that COPIES of their logits take at most SCRATCH bytes; at least one."""
    return max(1, SCRATCH // (COPIES * batch * keys * max(4, dtype.itemsize)))


def _mask_of(mask: Tensor | None, head: int, queries: slice, keys: int, causal: bool, like: Tensor) -> Tensor | None:
    """What is added to the logits of some queries, [B or 1, 1, queries, keys].

    Other attention functions are given masks of what may be seen, or none where a query sees all before it.
    """
    if mask is None:
        if not causal:
            return None
        places = torch.arange(keys, device=like.device)
        seen = (places <= places[queries, None])[None, None]
    else:
        seen = mask[:, head : head + 1] if mask.shape[1] > 1 else mask
        seen = (seen[:, :, queries] if seen.shape[2] > 1 else seen)[..., :keys]
        if seen.dtype != torch.bool:
            return seen
    hidden = torch.finfo(like.dtype).min
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, hidden)


class _OneHead:
    """An attention module as its plain attention function is to see it when it is given a single head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module, head: int) -> None:
        self._module, self._head = module, head

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return found[self._head : self._head + 1] if name == "sinks" else found
