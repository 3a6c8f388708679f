"""3:4 trits of Sherry (arXiv 2601.07892): of every four weights one is off, three are +-scale; 1.25 bits a weight.

Of each quartet the weight of least |w| is off (of equals the first), the others keep their signs (0 counts as positive,
so that there is never a second zero), and the scale is the mean |w| of those kept in the group. That is the best there
is under this constraint. Quartets are four neighbours, or `lane_stride` columns apart, as llama.cpp's STQ1_0 has them.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import Scoped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.sherry import Sherry, from_quartets, quartet_codes, to_quartets


@register("forward", "sherry")
class SherryForward(Scoped):
    """One zero and three signs in every quartet, with the mean of the kept as the scale (see the module)."""

    edges = False
    scope: Literal["tensor", "shard", "row", "group"] = Field(
        "group", description="what shares a scale: the whole matrix, a shard of it, a row, or a group of columns"
    )
    lane_stride: int = Field(1, ge=1, description="columns between the weights of a quartet; 16 for STQ1_0")

    def check_shape(self, shape: tuple[int, int], name: str) -> None:
        super().check_shape(shape, name)
        span, size = 4 * self.lane_stride, self.columns_of(shape[1])
        if shape[1] % span or size % span:
            raise RecipeError(
                f"{name} has {shape[1]} columns and scales for {size} of them, and quartets of the forward code sherry "
                f"need multiples of {span} of both: change forward.group_size, or name the layer in layers.skip"
            )

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks, columns = self.blocks(weight), weight.shape[1]
        quartets = to_quartets(self.flat(blocks, columns), self.lane_stride)
        off = quartets.abs().argmin(2, keepdim=True)
        kept = torch.ones_like(quartets).scatter_(2, off, 0.0)
        trits = from_quartets(torch.where(quartets < 0, -kept, kept), columns, self.lane_stride)
        mask = self.blocks(trits.abs())
        counts = self.counts((weight.shape[0], columns), blocks)
        scales = self.stored(self.total(blocks.abs() * mask) / (0.75 * counts))
        value = self.flat(self.blocks(trits) * scales, columns).to(weight.dtype)
        return Rounded(value, trits, self.spread(scales, blocks))

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        trits, scales = self.in_memory(found.digits, found.scales)
        codes = quartet_codes(to_quartets(trits, self.lane_stride))
        shape, size = (weight.shape[0], weight.shape[1]), self.columns_of(weight.shape[1])
        return Sherry.encode(codes, scales.to(self.stored_dtype), shape, size, self.lane_stride)
