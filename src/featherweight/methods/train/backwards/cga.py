"""CGA of OFQ (arXiv 2302.02210): in a last phase every weight that is clearly inside its bin is frozen.

A weight is trained while it stands within `band` steps of codes of the place where two codes meet, and has no gradient
elsewhere; what is frozen has, after the optimiser's step, the bits that it had before (neither momentum nor decay move
it). The band is looked at in each step anew, so what leaves it stays frozen. Before the phase begins the gradient goes
straight through.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Backward, Forward, Layer, Rounded, straight
from featherweight.registry import register


@register("backward", "cga")
class FreezeInside(Backward):
    """Only weights near an edge between two codes go on in the last phase (see the module)."""

    band: float = Field(0.005, gt=0, le=0.5, description="steps of codes to either side of an edge")
    begin: float = Field(0.9, ge=0, le=1, description="share of the steps before the phase")

    def refusal(self, forward: Forward) -> str:
        if not forward.edges:
            return (
                f"the backward rule cga needs fixed places between codes, which the forward code {forward.kind} lacks"
            )
        return super().refusal(forward)

    def passed(self, layer: Layer, forward: Forward, found: Rounded, learned: Tensor | None) -> Tensor:
        frozen = self.frozen(layer, forward, learned)
        return straight(layer.weight, found.value, None if frozen is None else (~frozen).to(layer.weight.dtype))

    @torch.no_grad()
    def frozen(self, layer: Layer, forward: Forward, learned: Tensor | None) -> Tensor | None:
        if layer.clock.progress < self.begin:
            return None
        position, low, high = forward.position(layer.weight, learned)
        edge = (position - 0.5).round().clamp(low, high - 1) + 0.5
        return (position - edge).abs() > self.band
