"""Elastic inputs of TBT (arXiv 2306.01841): one learned scale for a layer's input, of very few bits.

Symmetric: a clip(round(x / a), -Q_n, Q_p) with Q_n = Q_p = 1 for 2 bits (three levels), a sign(x) for 1 bit. Asymmetric
(after a softmax or an activation): of 2 bits the least input is taken off, x is a {0, 1, 2} and it is added again; of 1
bit a {0, 1}. Gradients are those of LSQ (methods/train/inputs.py). a begins, at the first batch, at
2 mean|x| / sqrt(2^(b-1) - 1) or, asymmetric, 4 mean|x| / sqrt(2^b - 1). No folder can hold such a layer.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.methods.train.base import Activation, Given, Layer, matches
from featherweight.methods.train.inputs import few_levels
from featherweight.methods.train.scopes import SMALLEST
from featherweight.registry import register

SCALE, BEGUN = "input_scale", "input_begun"


@register("activation", "elastic")
class ElasticInputs(Activation):
    """Few levels, with a learned scale for all inputs of a layer (see the module)."""

    bits: int = Field(2, ge=1, le=8, description="of an input; 2 are three levels")
    symmetric: bool = Field(True, description="levels to both sides of zero; else from the least input upwards")
    asymmetric: tuple[str, ...] = Field((), description="patterns of inputs that are not, whatever symmetric says")

    @property
    def unstorable(self) -> str:
        return "the activation elastic has a learned scale of inputs, which no folder can hold: take integers or none"

    def limits(self, symmetric: bool) -> tuple[int, int]:
        """The lowest and the highest whole number."""
        if not symmetric:
            return 0, 2 if self.bits == 2 else (1 << self.bits) - 1
        return (-1, 1) if self.bits <= 2 else (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1)

    def given(self) -> Given:
        return {
            SCALE: nn.Parameter(torch.ones((), device="cpu")),
            BEGUN: torch.zeros((), dtype=torch.bool, device="cpu"),
        }

    def first_scale(self, inputs: Tensor, symmetric: bool) -> Tensor:
        """By the first batch."""
        most = max(1, (1 << (self.bits - 1)) - 1) if symmetric else (1 << self.bits) - 1
        first: Tensor = (2 if symmetric else 4) * inputs.abs().mean() / most**0.5
        return first.clamp(min=SMALLEST)

    def rounded(self, layer: Layer, inputs: Tensor) -> Tensor:
        symmetric = self.symmetric and not matches(self.asymmetric, layer.name)
        scale, begun = layer.own(SCALE), layer.own(BEGUN)
        with torch.no_grad():
            if not bool(begun):
                scale.copy_(self.first_scale(inputs, symmetric))
                begun.fill_(True)
            scale.clamp_(min=SMALLEST)
        shift = inputs.detach().amin() if self.bits == 2 and not symmetric else None
        moved = inputs if shift is None else inputs - shift
        found = few_levels(moved, scale, self.limits(symmetric), self.bits == 1 and symmetric)
        return found if shift is None else found + shift
