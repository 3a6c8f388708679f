"""Elastic inputs of TBT (arXiv 2306.01841): one learned scale for a layer's input, of very few bits.

Symmetric: a clip(round(x / a), -Q_n, Q_p) with Q_n = Q_p = 1 for 2 bits (three levels), a sign(x) for 1 bit. Asymmetric
(after a softmax or an activation): of 2 bits the least input is taken off, x is a {0, 1, 2} and it is added again; of 1
bit a {0, 1}. da is that of LSQ, Q outside and round(x / a) - x / a inside, times 1 / sqrt(inputs Q_p); dx is 1 within
the limits. a begins, at the first batch, at 2 mean|x| / sqrt(2^(b-1) - 1) or, asymmetric, 4 mean|x| / sqrt(2^b - 1).
No folder can hold such a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.methods.train.base import Activation, Given, Layer
from featherweight.methods.train.scopes import SMALLEST
from featherweight.registry import register

SCALE, BEGUN = "input_scale", "input_begun"


class FewLevels(torch.autograd.Function):
    """a times the whole number nearest to x / a within limits; `signs`: a sign(x)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: Tensor, limits: tuple[int, int], signs: bool) -> Tensor:
        position = inputs / scale
        ctx.save_for_backward(position)
        ctx.limits, ctx.signs = limits, signs
        if signs:
            return torch.where(inputs < 0, -scale, scale)
        return position.clamp(*limits).round() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (position,) = ctx.saved_tensors
        low, high = ctx.limits
        below, above = position < low, position > high
        if ctx.signs:
            slope = torch.where(position < 0, -1.0, 1.0)
        else:
            slope = torch.where(below, float(low), torch.where(above, float(high), position.round() - position))
        factor = (position.numel() * high) ** -0.5
        return gradients[0] * ~(below | above), (gradients[0] * slope).sum().view(()) * factor, None, None


@register("activation", "elastic")
class ElasticInputs(Activation):
    """Few levels, with a learned scale for all inputs of a layer (see the module)."""

    bits: int = Field(2, ge=1, le=8, description="of an input; 2 are three levels")
    symmetric: bool = Field(True, description="levels to both sides of zero; else from the least input upwards")

    @property
    def unstorable(self) -> str:
        return "the activation elastic has a learned scale of inputs, which no folder can hold: take integers or none"

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest whole number."""
        if not self.symmetric:
            return 0, 2 if self.bits == 2 else (1 << self.bits) - 1
        return (-1, 1) if self.bits <= 2 else (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1)

    def given(self) -> Given:
        return {
            SCALE: nn.Parameter(torch.ones((), device="cpu")),
            BEGUN: torch.zeros((), dtype=torch.bool, device="cpu"),
        }

    def first_scale(self, inputs: Tensor) -> Tensor:
        """By the first batch."""
        most = max(1, (1 << (self.bits - 1)) - 1) if self.symmetric else (1 << self.bits) - 1
        first: Tensor = (2 if self.symmetric else 4) * inputs.abs().mean() / most**0.5
        return first.clamp(min=SMALLEST)

    def rounded(self, layer: Layer, inputs: Tensor) -> Tensor:
        scale, begun = layer.own(SCALE), layer.own(BEGUN)
        with torch.no_grad():
            if not bool(begun):
                scale.copy_(self.first_scale(inputs))
                begun.fill_(True)
            scale.clamp_(min=SMALLEST)
        signs = self.bits == 1 and self.symmetric
        shift = inputs.detach().amin() if self.bits == 2 and not self.symmetric else None
        moved = inputs if shift is None else inputs - shift
        found: Tensor = FewLevels.apply(moved, scale.to(inputs.dtype), self.limits, signs)  # type: ignore[no-untyped-call]
        return found if shift is None else found + shift
