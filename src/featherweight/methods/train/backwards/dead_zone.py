"""The gradient of Tequila (arXiv 2509.23809) without its bias: an ablation.

Beside the gradient straight through, each dead weight gets strength times the sum of its output's gradients over all
tokens, as if its row's bias had it; the forward pass has no such bias. With it, Tequila is the side path `tequila`.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.backwards.identity import IdentityRule
from featherweight.methods.train.base import Forward, Layer, Rounded
from featherweight.methods.train.dead import dead_bias
from featherweight.registry import register


@register("backward", "dead-zone")
class DeadZone(IdentityRule):
    """A gradient of their own for weights that are off (see the module)."""

    strength: float = Field(1e-3, gt=0, description="of that gradient, Tequila's lambda")

    def refusal(self, forward: Forward) -> str:
        if not forward.zero:
            return (
                f"the backward rule dead-zone is for weights that are off, and the forward code {forward.kind} has none"
            )
        return super().refusal(forward)

    def constant(self, layer: Layer, found: Rounded) -> Tensor:
        bias = dead_bias(layer.weight, found.digits, self.strength)
        return bias - bias.detach()
