"""A compressed folder as something that can be trained within its original: codes, and what else differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from featherweight.errors import CheckpointError, FeatherError
from featherweight.methods.quantize.latent import moved_digits
from featherweight.methods.quantize.modulated import one_plane
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.decoded import DecodedCheckpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.checkpoint.stored_code import read_code
from featherweight.storage.codes import Code, describe_code


@dataclass(frozen=True)
class Student:
    """What of a compressed folder is trained, and what stays.

    codes : of the layers of the blocks, by layer
    norms : all plain tensors of one dimension (norms and biases) in the type in which they are stored, by name
    fixed : other tensors that are not the original's, as they decode (embedding, output layer), by name; of those that
        are the original's there are none
    """

    small: DecodedCheckpoint
    codes: dict[str, Code]
    norms: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @classmethod
    def of(cls, small: Checkpoint, named: str | Path, original: Checkpoint, anatomy: Anatomy) -> Student:
        """CheckpointError where the folder is no compressed one of ours, or cannot have been made of the original."""
        if not isinstance(small, DecodedCheckpoint) or not small.compressed:
            raise CheckpointError(
                f"{named} is not compressed, so there is nothing to heal: name a folder that `feather compress` made"
            )
        _check_same(small, named, original)
        layers = {layer.name: layer for layer in anatomy.layers}
        specs = module_specs(small.coded.quantization_config or {})
        names = [name for name in layers if name in specs and specs[name].get("kind") != "dense"]
        if not names:
            raise FeatherError(f"no layer within the blocks of {named} is compressed: there is nothing to heal")
        codes = {name: read_code(small.coded, name, specs[name]) for name in names}
        trained = {layers[name].tensor for name in names}
        norms, fixed = {}, {}
        for name in small.names:
            if name in trained:
                continue
            shape = small.entry(name).shape
            if len(shape) == 1:
                norms[name] = small.tensor(name).clone()
            elif not original.has(name) or not _equal(small.tensor(name), original.tensor(name)):
                fixed[name] = small.tensor(name).float().clone()
            small.release(name)
        return cls(small, codes, norms, fixed)

    def checked(self, training: str) -> Student:
        """Itself; FeatherError where a layer is anything but one trit-plane, which the training cat-q needs."""
        other = next((name for name, code in self.codes.items() if not one_plane(code)), None)
        if training == "cat-q" and other is not None:
            raise FeatherError(
                f"{other} is {describe_code(self.codes[other].spec)}, and the training cat-q is for models of one "
                "trit-plane: leave out --training cat-q"
            )
        return self

    def moved(self, codes: Mapping[str, Code]) -> float:
        """Share of all weights whose digits are others in `codes`."""
        counts = [moved_digits(code, codes[name]) for name, code in self.codes.items() if name in codes]
        return sum(changed for changed, _ in counts) / max(1, sum(count for _, count in counts))


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one.float() == other.float()).all())


def _check_same(small: DecodedCheckpoint, named: str | Path, original: Checkpoint) -> None:
    """CheckpointError unless tensors have the same names and shapes; biases may have been added."""
    for name in original.names:
        if not small.has(name):
            raise CheckpointError(
                f"{named} has no tensor {name}, which {original.folder} has: it was made from another model; name the "
                "one it was made from with --against"
            )
        here, there = small.entry(name).shape, original.entry(name).shape
        if here != there:
            raise CheckpointError(
                f"{name} is {list(here)} in {named} and {list(there)} in {original.folder}: the two are different "
                "models; name the one it was made from with --against"
            )
    for name in small.names:
        if not original.has(name) and not name.endswith(".bias"):
            raise CheckpointError(
                f"{named} has a tensor {name}, which {original.folder} has not (a head of its own, where the original "
                "ties it): such a folder cannot be healed yet"
            )
