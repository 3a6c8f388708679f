"""What all codes with the digits -1, 0 and 1 share: their values, and one trit-plane to store them."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from featherweight.methods.train.base import Rounded
from featherweight.methods.train.scopes import Scoped
from featherweight.storage.codes import Code
from featherweight.storage.codes.trit_planes import TritPlanes


class Ternary(Scoped):
    """A forward code with one trit a weight."""

    @abc.abstractmethod
    def trits(self, weight: Tensor, blocks: Tensor, learned: Tensor | None) -> tuple[Tensor, Tensor]:
        """Trits of blocks [out, groups, size], and scales in the shape of `Scoped.total`, before they are stored."""

    @torch.no_grad()
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        blocks = self.blocks(weight)
        trits, scales = self.trits(weight, blocks, learned)
        scales = self.stored(scales)
        value = self.flat(trits * scales, weight.shape[1]).to(weight.dtype)
        return Rounded(value, self.flat(trits, weight.shape[1]), self.spread(scales, blocks))

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        found = self.rounded(weight, learned)
        digits, scales = self.in_memory(found.digits.to(torch.int8), found.scales)
        size = self.columns_of(weight.shape[1])
        return TritPlanes.encode(digits.unsqueeze(0), scales.unsqueeze(2), size, scale_dtype=self.stored_dtype)
