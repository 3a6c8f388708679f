"""Learned scales, LSQ (arXiv 1902.08153) and the elastic quantisers of TBT (arXiv 2306.01841): trits, or b bits.

A weight is s round(clip(w / s, -Q_n, Q_p)) with s trained: Q_n = Q_p = 1 for trits, Q_n = 2^(b-1) and Q_p = 2^(b-1) - 1
for b bits. s begins at 2 mean|w| / sqrt(Q_p). The backward rule `lsq` has the gradient of s.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import SMALLEST, Scoped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform


@register("forward", "elastic")
class Elastic(Scoped):
    """A learned scale, for trits or whole numbers of b bits (see the module)."""

    learned = True
    bits: int | None = Field(None, ge=2, le=8, description="of whole numbers; none for trits")

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest whole number."""
        return (-1, 1) if self.bits is None else (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1)

    def start(self, weight: Tensor) -> Tensor:
        blocks = self.blocks(weight)
        scales = 2 * self.mean_abs(weight, blocks) / self.limits[1] ** 0.5
        shape = self.learned_shape((weight.shape[0], weight.shape[1]))
        if self.scope == "shard" and self.shard_along == "output":
            scales = scales[:: weight.shape[0] // self.shards]
        first: Tensor = scales.squeeze(2).expand(shape).clamp(min=SMALLEST).to(weight.dtype).clone()
        return first

    def scales_of(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Learned scales spread to [out, groups], differentiable, before they are stored."""
        scales = self.start(weight) if learned is None else learned
        rows, columns = weight.shape
        if self.scope == "shard" and self.shard_along == "output":
            scales = scales.repeat_interleave(rows // self.shards, 0)
        return scales.expand(rows, -(-columns // self.columns_of(columns)))

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks = self.blocks(weight)
        scales = self.stored(self.scales_of(weight, learned).to(blocks.dtype))
        steps = scales.unsqueeze(2)
        digits = (blocks / steps).clamp_(*self.limits).round_()
        columns = weight.shape[1]
        return Rounded(self.flat(digits * steps, columns).to(weight.dtype), self.flat(digits, columns), scales)

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        digits, scales = self.in_memory(found.digits, found.scales)
        size = self.columns_of(weight.shape[1])
        if self.bits is None:
            trits = digits.to(torch.int8).unsqueeze(0)
            return TritPlanes.encode(trits, scales.unsqueeze(2), size, scale_dtype=self.stored_dtype)
        codes = digits - self.limits[0]
        return Uniform.encode(codes, scales, None, self.bits, size, scale_dtype=self.stored_dtype)

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        blocks = self.blocks(weight)
        scales = self.stored(self.scales_of(weight, learned).detach().to(blocks.dtype)).unsqueeze(2)
        return self.flat(blocks / scales, weight.shape[1]), *self.limits
