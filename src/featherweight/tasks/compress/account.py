"""The anatomy of a checkpoint that has been found to be the model its config.json describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.storage.checkpoint.anatomy import Anatomy, config_ties, own_head_text, read_anatomy
from featherweight.storage.checkpoint.anatomy.tensor_index import Described, Located
from featherweight.storage.checkpoint.checkpoint import Checkpoint


class Hiding:
    """A checkpoint without some of its tensors."""

    def __init__(self, checkpoint: Checkpoint, hidden: frozenset[str]) -> None:
        self._checkpoint = checkpoint
        self.names = tuple(name for name in checkpoint.names if name not in hidden)

    @property
    def folder(self) -> Path:
        return self._checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    def entry(self, name: str) -> Described:
        return self._checkpoint.entry(name)

    def file_of(self, name: str) -> Located:
        return self._checkpoint.file_of(name)

    def differ(self, one: str, other: str) -> bool:
        return self._checkpoint.differ(one, other)


def accounted_anatomy(checkpoint: Checkpoint) -> tuple[Anatomy, tuple[str, ...], dict[str, str]]:
    """The anatomy of what the model class uses, notes, and the tensors to leave out with the reason.

    Tensors that the class does not ask for are nothing that is compressed. Biases among them are left out, as a layer
    would seem to have one; the others, such as the blocks of another prediction head, are copied.

    Raises CheckpointError where tensors are missing or are not the model's own.
    """
    from featherweight.model.network.accounting import check_complete

    verdict = check_complete(checkpoint)
    anatomy = read_anatomy(Hiding(checkpoint, frozenset(verdict.unexpected)))
    layers = [*anatomy.layers, *([anatomy.head] if anatomy.head else [])]
    biases = {f"{layer.name}.bias" for layer in layers}
    dropped = {name: f"{verdict.asked} does not ask for it" for name in verdict.unexpected if name in biases}
    own = anatomy.head is not None and config_ties(checkpoint)
    return anatomy, (*verdict.notes, own_head_text(checkpoint)) if own else verdict.notes, dropped
