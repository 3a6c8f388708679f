"""Arenas, Sherry's annealed residual (arXiv 2601.07892): the latents themselves multiply, too, less and less.

y = x (Q + strength W)^T in training: the strength rises from 0 to 1 over the first tenth of the steps, then falls to 0
along a cosine; it is 0 in evaluation and in what is stored. As one product: rounded and latent weights are added first.
Its clock is that of the layer, which is saved with it; a layer whose clock nobody sets has none of it.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Layer, Side
from featherweight.registry import register


@register("side", "arenas")
class Arenas(Side):
    """The latents beside their rounded values, annealed (see the module)."""

    most: float = Field(1.0, gt=0, description="the greatest strength")
    rise: float = Field(0.1, gt=0, lt=1, description="share of the steps over which it is reached")

    def strength(self, progress: float) -> float:
        """At this share of the training."""
        if progress < self.rise:
            return self.most * progress / self.rise
        return self.most * 0.5 * (1 + math.cos(math.pi * (progress - self.rise) / (1 - self.rise)))

    def matrix(self, layer: Layer, value: Tensor) -> Tensor:
        strength = self.strength(layer.clock.progress) if layer.training else 0.0
        return value + strength * layer.weight if strength else value
