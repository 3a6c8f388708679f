"""TWN, Ternary Weight Networks (arXiv 1605.04711): off where |w| <= 0.75 mean|w|, the scale is the mean of the rest."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.scopes import SMALLEST
from featherweight.methods.train.ternary import Ternary
from featherweight.registry import register


@register("forward", "twn")
class TernaryWeightNetwork(Ternary):
    """Trits with a threshold of 0.75 mean|w|, and the mean of what is kept as the scale (see the module)."""

    threshold: float = Field(0.75, gt=0, description="times mean|w|: weights up to it are off")

    def trits(self, weight: Tensor, blocks: Tensor, learned: Tensor | None) -> tuple[Tensor, Tensor]:
        limit = self.threshold * self.mean_abs(weight, blocks)
        kept = (blocks.abs() > limit).to(blocks.dtype)
        scales = self.total(blocks.abs() * kept) / self.total(kept).clamp(min=1)
        return blocks.sign() * kept, scales.clamp(min=SMALLEST)

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        blocks = self.blocks(weight)
        limit = (self.threshold * self.mean_abs(weight, blocks)).clamp(min=SMALLEST)
        return self.flat(blocks / (2 * limit), weight.shape[1]), -1, 1
