"""Trits by mean|w|: BitNet b1.58 (arXiv 2402.17764), TriLM (2407.12327), Tequila (2509.23809), TBT (2306.01841).

With mu = mean|w| of what shares a scale and s = factor mu, a weight is s round(clip(w / s, -1, 1)): it is off where
|w| < s / 2. At |w| = s / 2 exactly papers differ: halves go to even in BitNet and TriLM (off), Tequila keeps them. A
factor of 4/3 gives equal thirds of -1, 0 and 1 for uniform weights (TBT). Digits are found with the scale before it is
rounded to its stored type, values with the scale after that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.scopes import SMALLEST
from featherweight.methods.train.ternary import Ternary
from featherweight.registry import register


@register("forward", "absmean")
class AbsMean(Ternary):
    """Trits with the scale mean|w| (see the module)."""

    factor: float = Field(1.0, gt=0, description="times mean|w| is the scale; 4/3 gives thirds for uniform weights")
    ties: Literal["off", "kept"] = Field("off", description="what becomes of a weight of half a scale exactly")

    def trits(self, weight: Tensor, blocks: Tensor, learned: Tensor | None) -> tuple[Tensor, Tensor]:
        scales = (self.factor * self.mean_abs(weight, blocks)).clamp(min=SMALLEST)
        if self.ties == "off":
            return (blocks / scales).clamp_(-1, 1).round_(), scales
        return blocks.sign() * (blocks.abs() >= scales / 2), scales

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        blocks = self.blocks(weight)
        scales = (self.factor * self.mean_abs(weight, blocks)).clamp(min=SMALLEST)
        return self.flat(blocks / scales, weight.shape[1]), -1, 1
