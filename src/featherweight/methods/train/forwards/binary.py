"""One bit a weight: mean|w| times its sign, as in BWN (arXiv 1603.05279) and TBT (arXiv 2306.01841); 0 has the sign +.

TBT's paper takes the mean off the weights first, so that as many are positive as negative; its code does not, which is
the default here. The scale is then the mean of what is left.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import Scoped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes


@register("forward", "binary")
class Binary(Scoped):
    """Signs with the scale mean|w| (see the module)."""

    zero = False
    centred: bool = Field(False, description="take the mean off the weights of what shares a scale first")

    def _centred(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks, centred where that is asked for, and the scales, in the shape of `Scoped.total`."""
        blocks = self.blocks(weight)
        counts = self.counts((weight.shape[0], weight.shape[1]), blocks)
        if self.centred:
            blocks = blocks - self.total(blocks) / counts
            real = self.blocks(torch.ones_like(weight))  # a short last group has none behind its end
            blocks = blocks * real
        return blocks, self.stored(self.total(blocks.abs()) / counts)

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks, scales = self._centred(weight)
        signs = torch.where(blocks < 0, -1.0, 1.0).to(blocks.dtype)
        columns = weight.shape[1]
        value = self.flat(signs * scales, columns).to(weight.dtype)
        return Rounded(value, self.flat(signs, columns), self.spread(scales, blocks))

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        signs, scales = self.in_memory(found.digits.to(torch.int8), found.scales)
        size = self.columns_of(weight.shape[1])
        return BinaryPlanes.encode(signs.unsqueeze(0), scales.unsqueeze(2), size, scale_dtype=self.stored_dtype)

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        """The codes are -1 and 0 here, which meet at -1/2, where the weight is 0."""
        blocks, scales = self._centred(weight)
        return self.flat(blocks / (2 * scales) - 0.5, weight.shape[1]), -1, 0
