"""Whole numbers of b bits, symmetric, with the largest |w| of what shares a scale as the largest number."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import Scoped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.uniform import Uniform


@register("forward", "uniform")
class UniformForward(Scoped):
    """Whole numbers of b bits, scale max|w| / (2^(b-1) - 1) (see the module)."""

    bits: int = Field(4, ge=2, le=8, description="of a weight")

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def _scales(self, blocks: Tensor) -> Tensor:
        """In the shape of `Scoped.total`."""
        if self.scope == "tensor":
            most = blocks.abs().amax().view(1, 1, 1)
        elif self.scope == "shard" and self.shard_along == "output":
            rows = len(blocks)
            parts = blocks.abs().reshape(self.shards, -1).amax(1)
            most = parts.repeat_interleave(rows // self.shards).view(rows, 1, 1)
        elif self.scope == "shard":
            most = blocks.abs().amax((0, 2)).view(1, -1, 1)
        else:
            most = blocks.abs().amax(2, keepdim=True)
        return self.stored(most / self.largest)

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks = self.blocks(weight)
        scales = self._scales(blocks)
        digits = (blocks / scales).round_().clamp_(-self.largest - 1, self.largest)
        columns = weight.shape[1]
        value = self.flat(digits * scales, columns).to(weight.dtype)
        return Rounded(value, self.flat(digits, columns), self.spread(scales, blocks))

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        digits, scales = self.in_memory(found.digits, found.scales)
        size = self.columns_of(weight.shape[1])
        return Uniform.encode(digits + self.largest + 1, scales, None, self.bits, size, scale_dtype=self.stored_dtype)

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        blocks = self.blocks(weight)
        return self.flat(blocks / self._scales(blocks), weight.shape[1]), -self.largest - 1, self.largest
