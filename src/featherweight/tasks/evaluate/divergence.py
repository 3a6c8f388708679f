"""KL divergence and agreement between the next-token distributions of an original and a compressed model.

KL(original || compressed) = sum over the vocabulary of p (log p - log q), in nats a token. Unlike a difference of
perplexities it cannot cancel: it is 0 only if every prediction is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Over all scored tokens: KL in nats, and the share of tokens on which both models' most likely token agrees.

    Standard errors, of `mean` and of the share, are from the spread between windows: tokens of one window are not
    independent, and taken as such they would seem far more certain than they are. None for a single window.
    """

    mean: float
    median: float
    percentile_99: float
    maximum: float
    standard_error: float | None
    top1_agreement: float
    top1_standard_error: float | None = None


@dataclass
class DivergenceSum:
    """Collects one float32 a token; the distributions themselves are not kept."""

    values: list[np.ndarray] = field(default_factory=list)
    agreeing: int = 0
    windows: list[tuple[float, int, int]] = field(default_factory=list)
    """Of each window that is done: its sum of KL, the tokens that agree, and all of its tokens."""
    _begun: int = 0  # the first of `values` that belongs to the window at hand
    _agreed: int = 0

    def add(self, original: Tensor, compressed: Tensor) -> None:
        """Log-probabilities float32 [tokens, vocabulary] of both models at the same positions."""
        self.values.append(kl_divergence(original, compressed).cpu().numpy())
        self.agreeing += int((original.argmax(-1) == compressed.argmax(-1)).sum())

    def end_window(self) -> None:
        """What was added since the last call was one window."""
        parts = self.values[self._begun :]
        total = math.fsum(float(part.sum(dtype=np.float64)) for part in parts)
        self.windows.append((total, self.agreeing - self._agreed, sum(len(part) for part in parts)))
        self._begun, self._agreed = len(self.values), self.agreeing

    def result(self) -> Divergence:
        values = np.concatenate(self.values).astype(np.float64)
        sums, agreed, counts = zip(*self.windows, strict=True) if self.windows else ((), (), ())
        return Divergence(
            mean=float(values.mean()),
            median=float(np.median(values)),
            percentile_99=float(np.percentile(values, 99)),
            maximum=float(values.max()),
            standard_error=ratio_error(sums, counts),
            top1_agreement=self.agreeing / len(values),
            top1_standard_error=ratio_error(agreed, counts),
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


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of sum(sums) / sum(counts) over windows, the linearised ratio estimator."""
    n, total = len(sums), sum(counts)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    residuals = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * residuals) / total
