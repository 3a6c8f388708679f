"""The order in which a training sees its batches."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Sampler(Protocol):
    """Numbers of batches, without end; can be stored and gone on from."""

    def next(self) -> int:
        """The batch of the next step."""
        ...

    def left(self) -> list[int]:
        """The batches that are settled already, the next one last."""
        ...

    def generator_state(self) -> Tensor:
        """Of the random numbers behind it, uint8."""
        ...

    def resume(self, left: list[int], generator_state: Tensor) -> None:
        """Go on from where `left` and `generator_state` were taken."""
        ...


class ShuffledRounds:
    """Round after round of all batches, each in a new random order.

    Parameters
    ----------
    batches : how many there are, at least one
    seed : of the orders
    """

    def __init__(self, batches: int, seed: int = 0) -> None:
        self.batches, self.seed = batches, seed
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._left: list[int] = []

    def next(self) -> int:
        if not self._left:
            self._left = torch.randperm(self.batches, generator=self._generator, device="cpu").tolist()
        return self._left.pop()

    def left(self) -> list[int]:
        return list(self._left)

    def generator_state(self) -> Tensor:
        return self._generator.get_state()

    def resume(self, left: list[int], generator_state: Tensor) -> None:
        self._left = list(left)
        self._generator.set_state(generator_state)
