"""The state of a training in the store of a run: saved at intervals of time, found by a run that goes on.

A state that is damaged, or of another task, is ignored, and that is said: the training then begins anew.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from featherweight.errors import OutputError
from featherweight.events import Observer
from featherweight.storage.run.store import Store
from featherweight.storage.run.training_store import TrainingState

SAVE_SECONDS = 60.0  # between two savings
SHARE = 20  # and at least this many times what the last one took


class TrainingFile:
    """A `TrainingStore` on disk. A disk that is full ends no training: it is said once, and the last state stays."""

    def __init__(self, store: Store, key: str, notify: Observer) -> None:
        self.store, self.key, self.notify = store, key, notify
        self._last, self._pause = time.monotonic(), SAVE_SECONDS
        self._full = False

    @property
    def path(self) -> Path:
        """The file, whether or not it is there."""
        return self.store.path(self.key)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._pause

    def save(self, state: TrainingState) -> None:
        begun = time.monotonic()
        record = {"task": state.task, "step": state.step, "facts": state.facts}
        try:
            self.store.keep(self.key, state.tensors, record)
        except OutputError as error:
            if not self._full:
                self._note(f"the state of the training cannot be saved ({error}); it goes on, but cannot be resumed")
            self._full = True
        self._last = time.monotonic()
        self._pause = max(SAVE_SECONDS, SHARE * (self._last - begun))

    def load(self, task: dict[str, Any]) -> TrainingState | None:
        if not self.store.has(self.key):
            return None
        found = self.store.record(self.key)
        if found is None or found.get("task") != task:
            why = "damaged" if found is None else "of another task"
            self._note(f"{self.path.name}, the saved state of a training, is {why} and ignored: it begins anew")
            self.store.drop(self.key)
            return None
        self._note(f"{task.get('label', 'the training')} goes on behind step {found['step']}, where it was saved")
        return TrainingState(found["task"], found["step"], found["facts"], self.store.tensors(self.key))

    def _note(self, text: str) -> None:
        self.notify({"event": "note", "text": text})
