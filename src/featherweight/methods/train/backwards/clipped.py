"""Straight through within limits: latents beyond `limit` scales get no gradient, so that they cannot run away."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Backward, Forward, Layer, Rounded, straight
from featherweight.registry import register


@register("backward", "clipped")
class Clipped(Backward):
    """The gradient as it is up to a size of the latent, none beyond (see the module)."""

    limit: float = Field(1.0, gt=0, description="times the largest value of its group: latents beyond get no gradient")

    def passed(self, layer: Layer, forward: Forward, found: Rounded, learned: Tensor | None) -> Tensor:
        latent = layer.weight.detach()
        columns, groups = latent.shape[1], found.scales.shape[1]
        tops = _largest(found, columns, groups)
        return straight(layer.weight, found.value, (latent.abs() <= self.limit * tops).to(latent.dtype))


def _largest(found: Rounded, columns: int, groups: int) -> Tensor:
    """The largest size of a rounded weight in the matrix, in scales, times each weight's scale: [out, in]."""
    size = -(-columns // groups)
    scales = found.scales.repeat_interleave(size, 1)[:, :columns]
    ratio = (found.value / scales).abs().amax()
    return ratio * scales
