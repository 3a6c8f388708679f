"""How much each calibration token counts: RSQ (arXiv 2503.01820), with the exponent and the floor as settings.

Weights are r = floor + score (1 - floor) with scores scaled to 0..1 in each sequence, raised to `exponent`, and divided
by their mean over the sequence. The released code has exponent 1; the paper's objective, with r inside the norm, is 2.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.feed import Feed, Session
from featherweight.model.network.query_blocks import attention_in_blocks, in_query_blocks


def normalised(scores: Tensor, minimum: float, exponent: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Weights float32 [B, T] with mean one in each sequence, from scores [B, T]; all one where scores do not differ.

    mask : bool [B, T], False for tokens that count nothing
    """
    scores = scores.double()
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.to(scores.device)
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    equal = ~(torch.isfinite(spread) & (spread > 0))
    unit = torch.where(equal, torch.ones_like(scores), (scores - low) / spread.masked_fill(equal, 1))
    weights = (minimum + unit.clamp(0, 1) * (1 - minimum)) ** exponent
    weights = weights.masked_fill(~real, 0)
    return (weights * real.sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-300)).float()


def weights_of_block(feed: Feed, session: Session) -> list[Tensor] | None:
    """Weights [B, T] of every batch for a block, mean one in each sequence; None where tokens are equal."""
    kind, settings = feed.settings.token_weights, feed.settings
    if kind == "none" or feed.whole:
        return None
    if kind == "attention" and session.index < len(feed.host.blocks):
        scores = [attention_weights(session, hidden, i) for i, hidden in enumerate(feed.hidden)]
    else:
        if kind == "attention" or feed.ids is None:  # the head has no attention
            return None
        scores = list(torch.split(text_scores(kind, feed.ids), [len(b["input_ids"]) for b in feed.batches]))
    weights = [
        normalised(s, settings.minimum_weight, settings.exponent, feed.mask_of(i)).to(feed.host.device)
        for i, s in enumerate(scores)
    ]
    total = sum(float(w.double().sum()) for w in weights)
    effective = total**2 / sum(float(w.double().square().sum()) for w in weights)
    session.effective_tokens = effective
    feed.notify({"event": "token weights", "block": session.index, "effective_tokens": effective, "tokens": total})
    return weights


def text_scores(kind: str, ids: Tensor) -> Tensor:
    """Scores [N, T] that depend on the text alone: `first` eighth of a window, or `frequency` (rare tokens high)."""
    if kind == "first":
        length = ids.shape[1]
        return (torch.arange(length, device=ids.device) < max(1, length // 8)).float().expand(ids.shape).clone()
    counts = torch.bincount(ids.reshape(-1))
    return -counts[ids].float()


def attention_weights(session: Session, hidden: Tensor, batch_index: int) -> Tensor:
    """Attention that each token receives in a block, summed over heads and queries: float32 [B, T].

    Where the model's attention goes through transformers' attention functions, probabilities are made for one head and
    some queries at a time, in SCRATCH bytes; elsewhere those of a whole batch [B, heads, T, T] are in memory, and
    `Calibration` makes batches small enough, down to one sequence.
    """
    calibration = session.calibration
    assert calibration.capture is not None
    arguments = calibration.capture.arguments[batch_index][session.index]
    hidden = hidden.to(session.host.device)
    with torch.no_grad():
        if in_query_blocks(session.module):
            found = attention_in_blocks(session.module, hidden, arguments.args, arguments.kwargs)
        else:
            with _probabilities(session.module) as kept:
                args, kwargs = _asking_for_attention(session.module, hidden, arguments.args, arguments.kwargs)
                session.module(hidden, *args, **kwargs)
            found = kept[0] if kept else None
    if found is None:
        raise CalibrationError(
            f"calibration.token_weights is 'attention', but {type(session.module).__name__} does not give its "
            "attention probabilities; use 'first', 'frequency' or 'none'"
        )
    return found.cpu()


def received(probabilities: Tensor) -> Tensor:
    """Sum over heads and queries of attention probabilities [B, heads, queries, keys]: float32 [B, keys]."""
    return probabilities.float().sum((1, 2))


@contextlib.contextmanager
def _probabilities(block: nn.Module) -> Iterator[list[Tensor]]:
    """What the first module of the block gives that looks like attention probabilities, as `received`."""
    found: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, tuple) and not found:
            for part in output[1:]:
                if isinstance(part, Tensor) and part.dim() == 4 and part.shape[2] <= part.shape[3]:
                    found.append(received(part[..., : part.shape[2]]))
                    break

    hooks = [module.register_forward_hook(hook) for module in block.modules()]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _asking_for_attention(
    block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments with `output_attentions`, where it knows it."""
    signature = inspect.signature(block.forward)
    if "output_attentions" not in signature.parameters:
        return args, kwargs
    bound = signature.bind(hidden, *args, **kwargs)
    bound.arguments["output_attentions"] = True
    return bound.args[1:], bound.kwargs
