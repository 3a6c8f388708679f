"""What a training has come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Training:
    """The result of `featherweight.train.run`.

    Attributes
    ----------
    out : the folder
    recipe : its name
    steps, tokens : of the whole training
    seconds : of this call
    resumed : steps that were found done
    loss : of the last logged step, nats a token
    held_out : loss on held-out windows at the end, nats a token
    bits_per_weight : of the low-bit layers, as stored
    bytes : of all tensors of the folder
    history : mappings with `step`, `loss`, `learning_rate`, `tokens_per_second`, and with low-bit layers `flipped` and
        `dead` (shares), or `step` and `held_out`
    """

    out: Path
    recipe: str
    steps: int
    tokens: int
    seconds: float
    resumed: int
    loss: float
    held_out: float
    bits_per_weight: float
    bytes: int
    history: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {**self.__dict__, "out": str(self.out)}
