"""What a compression keeps in the store of its run: layers, tensors that changed, trainings, verdicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.events import Observer
from featherweight.storage.codes import Code, code_from
from featherweight.storage.run.store import Store
from featherweight.storage.run.training_state import TrainingFile

LAYER, TUNED, CHANGED, TRAINING, VERDICT = "layer-", "tuned-", "changed-", "training-", "verdict-"
ALL_TUNED = "tuned"
"""Its artifact says that the layers that were changed together are all there; without it none of them counts."""
ERRORS = "errors-000000"
"""What candidates of layers miss, measured before layers are decided."""
STEPS = ("transform", "rounding", "correction")


def layer_key(index: int) -> str:
    """The key of a layer as it was solved."""
    return f"{LAYER}{index:06d}"


def changed_key(place: int) -> str:
    """The key of the plain tensors that changed in a block, or in a step behind all blocks."""
    return f"{CHANGED}{place:06d}"


class Work:
    """Layers are known by their number in the plan. See `Store` for what it means that something is kept."""

    store: Store
    assembly: Path

    def keep(self, index: int, code: Code, record: Mapping[str, Any]) -> None:
        """Store a finished layer; `record` holds its `name` and the `spec` of its code."""
        self.store.keep(layer_key(index), code.tensors(), record)

    def keep_tuned(self, layers: Mapping[int, tuple[Code, Mapping[str, Any]]]) -> None:
        """Store layers that were changed together; they count when all of them are there."""
        self.drop_tuned()
        for index, (code, record) in layers.items():
            self.store.keep(f"{TUNED}{index:06d}", code.tensors(), record)
        self.store.keep(ALL_TUNED, {}, {"layers": sorted(layers)})

    def is_tuned(self, indices: Collection[int]) -> bool:
        """Whether these layers were changed together and stored; some of them may be in shards already."""
        if self.store.record(ALL_TUNED) is None:
            return False
        return self.assembly.exists() or all(self.store.has(f"{TUNED}{index:06d}") for index in indices)

    def drop_tuned(self) -> None:
        """Layers are what they were before the stage that changed all of them."""
        self.store.drop(ALL_TUNED)  # first: what is left of the others never counts
        for key in self.store.names(TUNED):
            self.store.drop(key)

    def latest(self, index: int) -> str:
        """The key of a finished layer in its latest form."""
        tuned = f"{TUNED}{index:06d}"
        return tuned if self.store.has(ALL_TUNED) and self.store.has(tuned) else layer_key(index)

    def record(self, index: int, layer: str) -> dict[str, Any] | None:
        """What is known of a finished layer; None if its artifact is missing, damaged or of another layer."""
        key = self.latest(index)
        if not self.store.has(key):
            return None
        found = self.store.record(key)
        if found is not None and found.get("name") == layer:
            return found
        self.store.drop(key)
        if key.startswith(TUNED):  # its earlier form must not stand in for it among the others
            self.drop_tuned()
        return None

    def code(self, index: int) -> Code:
        """The code of a finished layer, as stored."""
        record, tensors = self.store.load(self.latest(index))
        return code_from(record["spec"], tensors)

    def discard(self, index: int) -> None:
        """Remove a layer's artifacts: its shard is written."""
        for kind in (LAYER, TUNED):  # never the latest form before the earlier one
            self.store.drop(f"{kind}{index:06d}")

    def keep_changed(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the plain tensors that a finished block has instead of the source's, also if there are none."""
        self.store.keep(changed_key(place), tensors, {})

    def changed(self, place: int) -> dict[str, Tensor] | None:
        """What `keep_changed` stored for a block; None if the block is not finished or the file is damaged."""
        key = changed_key(place)
        return None if self.store.record(key) is None else self.store.tensors(key)

    def changed_tensors(self) -> dict[str, str]:
        """Every plain tensor that some block changed -> the key that holds it; of several the last."""
        found: dict[str, str] = {}
        for key in self.store.names(CHANGED):
            with self.store.open(key) as file:
                found |= dict.fromkeys(file.entries, key)
        return found

    def keep_errors(self, errors: Mapping[str, float]) -> None:
        """Store what candidates of layers miss, by what they are; see `featherweight.tasks.compress.allocate`."""
        self.store.keep(ERRORS, {}, {"errors": dict(errors)})

    def errors(self) -> dict[str, float]:
        """What `keep_errors` stored last; empty where nothing was."""
        found = self.store.record(ERRORS)
        return {} if found is None else dict(found["errors"])

    def training_of(self, step: str, notify: Observer) -> TrainingFile:
        """Where a training leaves its state."""
        return TrainingFile(self.store, f"{TRAINING}{step}", notify)

    def end_training(self) -> None:
        """What came of the trainings is stored: their states are no longer needed."""
        for key in self.store.names(TRAINING):
            self.store.drop(key)

    def keep_verdict(self, step: str, facts: Mapping[str, Any]) -> None:
        """Store what came of a step that changed the whole model; `facts` hold `kept`."""
        self.store.keep(f"{VERDICT}{step}", {}, facts)

    def verdict(self, step: str) -> dict[str, Any] | None:
        """What `keep_verdict` stored; None if there is nothing or it cannot be read."""
        found = self.store.record(f"{VERDICT}{step}")
        return found if found is not None and isinstance(found.get("kept"), bool) else None

    def all_verdicts(self) -> list[dict[str, Any]]:
        """Of all steps: transforms, rounding, corrections, in their order."""
        steps = [key.removeprefix(VERDICT) for key in self.store.names(VERDICT)]
        steps.sort(key=lambda step: (STEPS.index(step.partition("-")[0]), step))
        return [found for found in map(self.verdict, steps) if found is not None]
