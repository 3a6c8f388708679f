"""The identity straight through (arXiv 1308.3432; BitNet, TriLM, TBT, StatsQ, Sherry).

Every latent gets the gradient of its rounded value, whatever it is and however far outside; scales are constants.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.methods.train.base import Backward, Forward, Layer, Rounded, straight
from featherweight.registry import register


@register("backward", "identity")
class IdentityRule(Backward):
    """The gradient as it is (see the module)."""

    def passed(self, layer: Layer, forward: Forward, found: Rounded, learned: Tensor | None) -> Tensor:
        return straight(layer.weight, found.value)
