"""Which codes change in a training: the share that flips in a step, flips that take back the one before, dead weights.

For any model with low-bit layers: `Flips(model)`, then `counted()` after each step, or every few. It keeps a byte for
the digit of every weight, and one for its last direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from featherweight.methods.train.prepare import low_bit_modules


class Flipped(NamedTuple):
    """weights : of all low-bit layers, and of products of queries and keys
    flips : weights whose digit is another one than when it was counted before
    reversals : those of them whose flip before went the other way
    dead : weights with the digit 0
    """

    weights: int
    flips: int
    reversals: int
    dead: int

    @property
    def flipped_share(self) -> float:
        return self.flips / max(1, self.weights)

    @property
    def dead_share(self) -> float:
        return self.dead / max(1, self.weights)


class Flips:
    """See the module; digits are kept where the layers are."""

    def __init__(self, model: nn.Module) -> None:
        found = low_bit_modules(model)
        self.layers = {name: layer for name, layer in found.items() if layer.choices.forward.kind != "full"}
        self.before = {name: self._digits(name) for name in self.layers}
        self.directions: dict[str, Tensor] = {}

    def _digits(self, name: str) -> Tensor:
        return self.layers[name].rounded().digits.to(torch.int16)

    def counted(self) -> Flipped:
        """What has changed since the last call, or since the beginning."""
        weights = flips = reversals = dead = 0
        for name in self.layers:
            now, before = self._digits(name), self.before[name]
            direction = (now - before).sign().to(torch.int8)
            known = self.directions.setdefault(name, torch.zeros_like(direction))
            flips += int((direction != 0).sum())
            reversals += int(((direction != 0) & (direction == -known)).sum())
            dead += int((now == 0).sum()) if self.layers[name].choices.forward.zero else 0
            weights += now.numel()
            self.directions[name] = torch.where(direction != 0, direction, known)
            self.before[name] = now
        return Flipped(weights, flips, reversals, dead)
