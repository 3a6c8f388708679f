"""KL divergence and agreement between the next-token distributions of an original and a compressed model.

KL(original || compressed) = sum over the vocabulary of p (log p - log q), in nats a token. Unlike a difference of
perplexities it cannot cancel: it is 0 only if every prediction is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Over all scored tokens: KL in nats, and the share of tokens on which both models' most likely token agrees."""

    mean: float
    median: float
    percentile_99: float
    maximum: float
    standard_error: float
    top1_agreement: float


@dataclass
class DivergenceSum:
    """Collects one float32 a token; the distributions themselves are not kept."""

    values: list[np.ndarray] = field(default_factory=list)
    agreeing: int = 0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Log-probabilities float32 [tokens, vocabulary] of both models at the same positions."""
        self.values.append(kl_divergence(original, compressed).cpu().numpy())
        self.agreeing += int((original.argmax(-1) == compressed.argmax(-1)).sum())

    def result(self) -> Divergence:
        values = np.concatenate(self.values).astype(np.float64)
        return Divergence(
            mean=float(values.mean()),
            median=float(np.median(values)),
            percentile_99=float(np.percentile(values, 99)),
            maximum=float(values.max()),
            standard_error=float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0,
            top1_agreement=self.agreeing / len(values),
        )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, float32 [tokens], from log-probabilities [tokens, vocabulary].

    Tokens with p = 0 count nothing. The sum is cut at 0, below which only rounding can take it.
    """
    p = log_p.exp()
    total = (log_p - log_q).mul_(p).sum(-1)
    if torch.isnan(total).any():  # 0 (-inf - ...), where a model excludes tokens
        total = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return total.clamp_(min=0)
