"""Tequila (arXiv 2509.23809): dead weights work as a bias, strength times their sum, the same for every token.

Each of them thereby has a gradient of its own and is not trapped where it is off. After training the bias is a vector,
stored as the layer's bias. The paper's strength (lambda) is 1e-3 in its script; its effect grows with the tokens of a
step, over which the bias's gradient is summed.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Backward, Forward, Layer, Rounded, Side
from featherweight.methods.train.dead import dead_bias
from featherweight.registry import register


@register("side", "tequila")
class Tequila(Side):
    """A bias of the weights that are off (see the module)."""

    strength: float = Field(1e-3, ge=0, description="of the bias, the paper's lambda")

    def refusal(self, forward: Forward, backward: Backward) -> str:
        if not forward.zero:
            return (
                f"the side path tequila is a bias of weights that are off, and the forward code {forward.kind} has none"
            )
        if backward.kind == "dead-zone":
            return "the side path tequila has the gradient of the backward rule dead-zone: take one of the two"
        return ""

    def constant(self, layer: Layer, found: Rounded) -> Tensor | None:
        return dead_bias(layer.weight, found.digits, self.strength) if self.strength else None
