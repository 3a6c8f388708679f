"""The state of a training on disk: two files in turn, so that one whole state is always there."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.learn.optimisers import remembered, remind
from featherweight.storage.run.folder import RunFolder

KEYS = ("training-train-a", "training-train-b")
PAUSE, SHARE = 60.0, 20.0
"""Seconds between two savings, and how many times what the last one took."""


class StateKeeper:
    """Saves what further steps depend on, and finds the last whole one."""

    def __init__(self, run: RunFolder, model: nn.Module, optimiser: torch.optim.Optimizer, every: int | None) -> None:
        self.store, self.model, self.optimiser, self.every = run.store, model, optimiser, every
        self.parameters = list(model.parameters())
        self.saved = time.monotonic()
        self.pause = PAUSE
        self.turn = 0

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is to be saved."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.saved >= self.pause

    def save(self, step: int, facts: dict[str, Any]) -> None:
        """Of a training of which `step` steps are done; OutputError where the disk does not take it."""
        begun = time.monotonic()
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        tensors |= {f"moment.{name}": kept for name, kept in remembered(self.optimiser, self.parameters).items()}
        self.store.keep(KEYS[self.turn], tensors, {"step": step, "facts": facts})
        self.turn = 1 - self.turn
        self.saved = time.monotonic()
        self.pause = max(PAUSE, SHARE * (self.saved - begun))

    def load(self) -> tuple[int, dict[str, Any]]:
        """Take the last whole state; 0 steps where there is none."""
        records = {key: self.store.record(key) for key in KEYS}
        found = [(record["step"], key) for key, record in records.items() if record is not None]
        if not found:
            return 0, {}
        step, key = max(found)
        self.turn = 1 - KEYS.index(key)
        record, tensors = self.store.load(key)
        own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        with torch.no_grad():
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                tensor.copy_(own[name])
        moments = {name.removeprefix("moment."): t for name, t in tensors.items() if name.startswith("moment.")}
        remind(self.optimiser, self.parameters, moments)
        return step, dict(record["facts"])
