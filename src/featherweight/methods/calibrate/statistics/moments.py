"""Second moments [in, in].

gram            sum w x x' / sum w          (GPTQ's Hessian, arXiv 2210.17323, without its factor 2)
held_out_gram   the same of windows that enter no other statistics
held_out_plain  held_out_gram with all tokens alike, where the loss's gradients weigh them elsewhere
gram_of_rows    [g, in, in], gram with the weights that each run of output rows has of its own (GuidedQuant)
cross           sum w (x~ - x) x' / sum w   (GPTAQ, arXiv 2504.02692), x~ the input in the full-precision stream
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics.base import Basis, Running, Statistic, Statistics, Tokens
from featherweight.native.moments import PairMoment
from featherweight.native.moments import available as pairs_available
from featherweight.registry import register


def symmetric(moment: Tensor) -> Tensor:
    """The moment [in, in] itself if it equals its transpose in every bit, else (M + M') / 2, which does.

    Products leave the two triangles apart by rounding, by how much depends on the BLAS. What is symmetric is not
    copied: factors are kept for the very tensor they were made from.
    """
    return moment if torch.equal(moment, moment.mT) else (moment + moment.mT) / 2


def _on_both_sides(moment: Tensor, basis: Basis) -> Tensor:
    return basis.inputs(basis.inputs(moment).mT.contiguous()).mT.contiguous()


STRIPES, NARROWEST = 4, 192
"""A product of an input with itself is made in so many stripes of rows, of at least so many, from the diagonal on."""


class _RunningGram(Running):
    """Above the diagonal, mirrored in the end: by the instructions for pairs of bfloat16 where inputs are such numbers,
    else stripe by stripe, which takes 0.7 of the time of the whole product."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.mean = torch.zeros(in_features, in_features, device=device)
        self._stripe = max(NARROWEST, -(-in_features // STRIPES // 16) * 16)
        self._pairs: PairMoment | None = None

    def add(self, tokens: Tokens) -> None:
        if tokens.pairs and pairs_available():
            self._pairs = self._pairs or PairMoment(self.mean, above=True)
            self._pairs.add(tokens.rooted, tokens.rooted, tokens.old, tokens.new)
            return
        scaled = tokens.inputs if tokens.weights is None else tokens.inputs * tokens.weights.sqrt()[:, None]
        for first in range(0, scaled.shape[1], self._stripe):
            last = first + self._stripe
            part = self.mean[first:last, first:]
            part.addmm_(scaled[:, first:last].t(), scaled[:, first:], beta=tokens.old, alpha=tokens.new)

    def finish(self) -> Tensor:
        for first in range(0, len(self.mean), self._stripe):
            last = first + self._stripe
            self.mean[last:, first:last] = self.mean[first:last, last:].t()
            middle = self.mean[first:last, first:last]
            middle.copy_(middle.triu() + middle.triu(1).t())
        return self.mean


class _RunningCross(Running):
    def __init__(self, in_features: int, device: torch.device) -> None:
        self.mean = torch.zeros(in_features, in_features, device=device)
        self._pairs: PairMoment | None = None

    def add(self, tokens: Tokens) -> None:
        if tokens.difference is None:
            self.mean.mul_(tokens.old)
        elif tokens.pairs and pairs_available():
            self._pairs = self._pairs or PairMoment(self.mean)
            root = 1 if tokens.weights is None else tokens.weights.sqrt()[:, None]
            self._pairs.add((tokens.difference * root).bfloat16(), tokens.rooted, tokens.old, tokens.new)
        else:
            self.mean.addmm_(tokens.difference.float().t(), tokens.weighted, beta=tokens.old, alpha=tokens.new)

    def finish(self) -> Tensor:
        return self.mean


@register("statistic", "gram")
class Gram(Statistic):
    axes: ClassVar[tuple[str, ...]] = ("in", "in")

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningGram(in_features, device)

    def unchanged(self, value: Tensor) -> Tensor:
        return symmetric(value)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return symmetric(_on_both_sides(value, basis))


@register("statistic", "held_out_gram")
class HeldOutGram(Gram):
    held_out = True


@register("statistic", "held_out_plain")
class HeldOutPlain(HeldOutGram):
    gathered = False


@register("statistic", "gram_of_rows")
class GramOfRows(Gram):
    axes = ("groups", "in", "in")
    gathered = False
    of_layer = True


@register("statistic", "cross")
class Cross(Statistic):
    axes = ("in", "in")
    stored = False
    two_streams = True

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningCross(in_features, device)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return _on_both_sides(value, basis)
