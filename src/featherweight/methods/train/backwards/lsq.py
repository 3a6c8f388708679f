"""LSQ (arXiv 1902.08153; elastic quantisers of TBT, arXiv 2306.01841): scales are trained with the weights.

With x = w / s between -Q_n and Q_p: dv/dw is 1 within these limits and 0 outside, dv/ds is round(x) - x within, -Q_n
below and Q_p above; the gradient of s is multiplied by 1 / sqrt(weights with this scale x Q_p).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.methods.train.base import Backward, Forward, Layer, Rounded
from featherweight.methods.train.forwards.elastic import Elastic
from featherweight.registry import register


class Lsq(torch.autograd.Function):
    """Gradients of latents and spread scales, see the module; the value was found before."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scales: Tensor, value: Tensor, stored: Tensor, limits: tuple[int, int, float]
    ) -> Tensor:
        ctx.save_for_backward(latent, stored)
        ctx.limits = limits
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        latent, stored = ctx.saved_tensors
        low, high, factor = ctx.limits
        (rows, columns), groups = latent.shape, stored.shape[1]
        size = -(-columns // groups)
        spread = stored.to(latent.dtype).repeat_interleave(size, 1)[:, :columns]
        position = latent / spread
        below, above = position < low, position > high
        slope = torch.where(below, float(low), torch.where(above, float(high), position.round() - position))
        by_weight = torch.nn.functional.pad(gradients[0] * slope, (0, groups * size - columns))
        to_scales = by_weight.view(rows, groups, size).sum(2) * factor
        return gradients[0] * ~(below | above), to_scales, None, None, None


@register("backward", "lsq")
class LearnedStep(Backward):
    """Scales and latents both, as in LSQ (see the module)."""

    def refusal(self, forward: Forward) -> str:
        if not isinstance(forward, Elastic):
            why = f"and the forward code {forward.kind} computes its own: take elastic"
            return f"the backward rule lsq trains scales, {why}"
        return ""

    def passed(self, layer: Layer, forward: Forward, found: Rounded, learned: Tensor | None) -> Tensor:
        assert isinstance(forward, Elastic)
        assert learned is not None
        scales = forward.scales_of(layer.weight, learned)
        low, high = forward.limits
        factor = (layer.weight.numel() / learned.numel() * high) ** -0.5
        passed: Tensor = Lsq.apply(  # type: ignore[no-untyped-call]
            layer.weight, scales, found.value, found.scales, (low, high, factor)
        )
        return passed
