"""StatsQ of OFQ (arXiv 2302.02210): b bits without a zero, and a scale from mean|w|, for weights of each row.

s = 2 mean|w|, u = clip(w / s, -1, 1), k = floor of u 2^(b-1) in {-2^(b-1), ..., 2^(b-1) - 1} (paper: round(u n - 1/2),
halves to even; clipped after rounding, as 1 - 1e-6 does not exist in every type), value s (k + 1/2) / 2^(b-1). For
uniform weights all codes are equally likely. A row of zeros has the least scale there is.

Stored as b binary planes with the scales s / 2, s / 4, ...: halves of a number are exact in floating-point types, where
a uniform code with an offset would have to round (k + 1/2) s.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import SMALLEST, Scoped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes


@register("forward", "statsq")
class StatsQ(Scoped):
    """b bits around zero, none of them zero, with the scale 2 mean|w| (see the module)."""

    zero = False
    bits: int = Field(2, ge=1, le=8, description="of a weight")

    @property
    def half(self) -> int:
        """Codes on either side of zero."""
        return 1 << (self.bits - 1)

    def _scales(self, weight: Tensor, blocks: Tensor) -> Tensor:
        return (2 * self.mean_abs(weight, blocks)).clamp(min=SMALLEST)

    def stored(self, scales: Tensor) -> Tensor:
        """Also a multiple of what the last plane's least step makes of it, so that every halving is exact."""
        rounded = super().stored(scales)
        if self.scale_dtype == "float32":
            return rounded
        step = 2.0**-24 * (1 << self.bits)
        return (rounded / step).round().clamp(min=1) * step

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks = self.blocks(weight)
        wanted = self._scales(weight, blocks)
        scales = self.stored(wanted)
        codes = ((blocks / wanted).clamp_(-1, 1) * self.half - 0.5).round_().clamp_(-self.half, self.half - 1)
        value = (codes + 0.5) / self.half * scales
        columns = weight.shape[1]
        found = self.spread(scales, blocks)
        return Rounded(self.flat(value, columns).to(weight.dtype), self.flat(codes, columns), found)

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        digits, scales = self.in_memory(found.digits, found.scales)
        bits = (digits + self.half).to(torch.int64)  # whole numbers from 0
        places = range(self.bits - 1, -1, -1)
        signs = torch.stack([((bits >> place) & 1) * 2 - 1 for place in places]).to(torch.int8)
        each = torch.stack([scales / (2 << (self.bits - 1 - place)) for place in places], -1)
        return BinaryPlanes.encode(signs, each, self.columns_of(weight.shape[1]), scale_dtype=self.stored_dtype)

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        blocks = self.blocks(weight)
        inside = (blocks / self._scales(weight, blocks)).clamp(-1, 1) * self.half - 0.5
        return self.flat(inside, weight.shape[1]), -self.half, self.half - 1
