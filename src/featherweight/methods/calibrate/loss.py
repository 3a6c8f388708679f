"""The loss at the end of a network, whose gradients say what matters to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass
class EndLoss:
    """Of a causal language model the negative log-likelihood of the text; other models are their own reference.

    Labels of a masked language model are drawn from its own distribution, and outputs without a distribution are taken
    as means of unit normal ones, whose gradients have the same second moments.

    Attributes
    ----------
    model : the network
    reads_tokens : whether its input are token ids
    generator : what labels are drawn with
    drawn : draw labels from the model's own softmax for causal models too (the true Fisher information)
    reduction : "mean" over the tokens of a sample, or their "sum"
    """

    model: nn.Module
    reads_tokens: bool
    generator: torch.Generator
    drawn: bool = False
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, output: Tensor, sample: Mapping[str, Tensor]) -> Tensor:
        """The loss in nats. output : [B, T, vocabulary or hidden]; sample : input_ids [B, T], attention_mask."""
        output = output.float() if output.dtype != torch.float64 else output
        if not self.reads_tokens or not has_logits(self.model):
            noise = torch.randn(output.shape, generator=self.generator, device="cpu").to(output)
            count = max(1, output.numel() // output.shape[-1])
            return (output * noise).sum() / (count if self.reduction == "mean" else 1)
        ids = sample["input_ids"].to(output.device)
        real = sample.get("attention_mask", torch.ones_like(ids)).to(output.device).bool()
        labels = ids
        if is_causal(self.model):
            output, labels, real = output[:, :-1], ids[:, 1:], real[:, 1:]
        if self.drawn or not is_causal(self.model):
            chances = output.detach().softmax(-1).flatten(0, 1).cpu()
            labels = torch.multinomial(chances, 1, generator=self.generator).view(labels.shape).to(output.device)
        return nn.functional.cross_entropy(output[real], labels[real], reduction=self.reduction)


def has_logits(model: Any) -> bool:
    """Whether a model's outputs are logits over a vocabulary; those of an encoder are hidden states."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def is_causal(model: Any) -> bool:
    """Whether a model predicts the next token."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
