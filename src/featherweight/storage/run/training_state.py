"""The state of a training, in a file of the run folder: written at intervals of time, found by a run that goes on.

A safetensors file whose header holds the JSON of what is not a tensor, its hash and those of the tensors. A file that
is cut short or changed, or of another task, is ignored, and that is said: the training then begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, OutputError
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.run.training_store import TrainingState

SAVE_SECONDS = 60.0  # between two savings
SHARE = 20  # and at least this many times what the last one took
STATE_KEY = "featherweight.training"
STATE_HASH_KEY = "featherweight.training_sha256"


class TrainingFile:
    """A `TrainingStore` on disk. A disk that is full ends no training: it is said once, and the last state stays."""

    def __init__(self, path: Path, notify: Callable[[dict[str, Any]], None]) -> None:
        self.path, self.notify = path, notify
        self._last, self._pause = time.monotonic(), SAVE_SECONDS
        self._full = False

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._pause

    def save(self, state: TrainingState) -> None:
        begun = time.monotonic()
        text = json.dumps({"task": state.task, "step": state.step, "facts": state.facts})
        blobs = [blob_of(name, value) for name, value in state.tensors.items()]
        try:
            write_safetensors(self.path, blobs, {STATE_KEY: text, STATE_HASH_KEY: sha256_of(text)}, sync=False)
        except OutputError as error:
            if not self._full:
                self._note(f"the state of the training cannot be saved ({error}); it goes on, but cannot be resumed")
            self._full = True
        self._last = time.monotonic()
        self._pause = max(SAVE_SECONDS, SHARE * (self._last - begun))

    def load(self, task: dict[str, Any]) -> TrainingState | None:
        if not self.path.exists():
            return None
        state = self._read()
        if state is None or state.task != task:
            why = "damaged" if state is None else "of another task"
            self._note(f"{self.path.name}, the saved state of a training, is {why} and ignored: it begins anew")
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None
        self._note(f"{task.get('label', 'the training')} goes on behind step {state.step}, where it was saved")
        return state

    def _read(self) -> TrainingState | None:
        """None if the file is not what was written."""
        try:
            with SafetensorsFile.open(self.path) as file:
                text = file.metadata[STATE_KEY]
                if file.metadata[STATE_HASH_KEY] != sha256_of(text) or damaged_tensors(file):
                    return None
                tensors = {name: file.tensor(name).clone() for name in file.entries}
            found = json.loads(text)
            return TrainingState(found["task"], found["step"], found["facts"], tensors)
        except (CheckpointError, OSError, KeyError, ValueError, TypeError, AttributeError):
            return None

    def _note(self, text: str) -> None:
        self.notify({"event": "note", "text": text})


def damaged_tensors(file: SafetensorsFile) -> list[str]:
    """Names of tensors whose bytes do not have the hash the file states; KeyError if it states none."""
    from featherweight.storage.checkpoint.format import HASHES_KEY

    hashes = json.loads(file.metadata[HASHES_KEY])
    wrong = [name for name in hashes if name not in file.entries]
    for name in file.entries:
        digest = hashlib.sha256()
        for window in file.raw_windows(name):
            digest.update(window)
        if digest.hexdigest() != hashes.get(name):
            wrong.append(name)
    return wrong


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
