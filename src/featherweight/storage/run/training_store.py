"""What a training leaves behind so that it can go on: its state, and where that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TrainingState:
    """What a training needs to go on exactly as if it had not been stopped.

    task : what is trained and how, JSON-able; a state is of use to an equal task only
    step : steps done
    facts : further JSON-able values
    tensors : by name, of the types that safetensors knows
    """

    task: dict[str, Any]
    step: int
    facts: dict[str, Any]
    tensors: Mapping[str, Tensor]


class TrainingStore(Protocol):
    """Keeps the state of a training where it outlives the process. Loops ask it; they never see a file."""

    def load(self, task: dict[str, Any]) -> TrainingState | None:
        """The last state of this task, or None; what is damaged or of another task does not count."""
        ...

    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def save(self, state: TrainingState) -> None:
        """Take the place of the former state, whole or not at all."""
        ...


class NoStore:
    """A `TrainingStore` that keeps nothing."""

    def load(self, task: dict[str, Any]) -> TrainingState | None:
        return None

    def due(self) -> bool:
        return False

    def save(self, state: TrainingState) -> None:
        pass


NO_STORE = NoStore()
