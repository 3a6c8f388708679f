"""A stack on disk, and how much of it a number of bytes takes.

A stack is an ordinary folder of ours whose layers are sums of blocks, with the manifest's entry `stack`:

    {"order": "average", "modules": [NAME, ...], "blocks": [place in modules, ...]}

The first weight file has everything that is always loaded, the first block of every layer included; the second has the
other blocks one behind the other, in the order of `blocks`, where a layer's own come in their order. So the first n
blocks are a stretch at the beginning of that file. What a prefix is as a folder has one file: its bytes are what sizes
are about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, FeatherError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_layout, module_specs
from featherweight.storage.checkpoint.writer import Blob, header_bytes
from featherweight.storage.codes import code_prefix
from featherweight.storage.codes.base import code_class
from featherweight.storage.run.ownership import MANIFEST
from featherweight.system.files import read_object
from featherweight.system.units import parse_size, size_text

ENTRY = "stack"


def blocks_in(spec: dict[str, Any]) -> int:
    """Blocks of a code whose blocks are whole tensors, one behind the other; 1 for every other code."""
    count = code_class(spec).summands(spec)
    if count < 2:
        return 1
    return count if all(cut.dim is None for cut in code_prefix(spec, count - 1)[1].values()) else 1


class Stack:
    """A stack, opened for reading; a context manager.

    Attributes
    ----------
    folder : Path
    checkpoint : the whole folder
    specs : module -> spec with all blocks, of every compressed module
    order : name of the order
    sequence : module of each block beyond the first ones

    Raises
    ------
    CheckpointError
        The folder is no stack, or its index does not fit its files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self.manifest = read_object(self.folder / MANIFEST)
        entry = self.manifest.get(ENTRY)
        if not isinstance(entry, dict):
            raise CheckpointError(f"{self.folder} is no stack of blocks: make one with `feather stack MODEL --out DIR`")
        self.specs = module_specs(checkpoint.quantization_config or {})
        self.order = str(entry.get("order"))[:40]
        self.sequence = self._sequence(entry)
        self._check_files()

    @classmethod
    def open(cls, folder: str | Path) -> Stack:
        checkpoint = Checkpoint.open(folder)
        try:
            return cls(checkpoint)
        except BaseException:
            checkpoint.close()
            raise

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    @property
    def blocks(self) -> int:
        """All blocks beyond the first ones."""
        return len(self.sequence)

    def levels(self, blocks: int) -> dict[str, int]:
        """Blocks of each stacked module, where the first `blocks` of the sequence are there."""
        found = {module: 1 for module, spec in self.specs.items() if blocks_in(spec) > 1}
        for module in self.sequence[:blocks]:
            found[module] += 1
        return found

    def prefix_specs(self, blocks: int) -> dict[str, dict[str, Any]]:
        """Specs of all compressed modules in a prefix."""
        levels = self.levels(blocks)
        return {m: code_prefix(spec, levels[m])[0] if m in levels else spec for m, spec in self.specs.items()}

    def stored(self, module: str, level: int) -> dict[str, str]:
        """Of a stacked module at a level: names of its tensors there -> names in this folder, without the module's."""
        return {name: cut.tensor for name, cut in code_prefix(self.specs[module], level)[1].items()}

    def blobs(self, blocks: int) -> list[Blob]:
        """All tensors of a prefix, under the names they have in it."""
        levels = self.levels(blocks)
        own = {f"{m}.{name}" for m in levels for name in module_layout(m, self.specs[m])}
        names = {name: name for name in self.checkpoint.names if name not in own}
        for module, level in levels.items():
            names |= {f"{module}.{new}": f"{module}.{old}" for new, old in self.stored(module, level).items()}
        return [self.blob(new, old) for new, old in names.items()]

    def blob(self, name: str, stored: str) -> Blob:
        """A tensor of this folder as something to write under another name."""
        entry = self.checkpoint.entry(stored)
        return Blob(name, entry.dtype, entry.shape, entry.nbytes, partial(self.checkpoint.raw_windows, stored))

    def nbytes(self, blocks: int) -> int:
        """Bytes of the weight file of a prefix, header and all."""
        blobs = self.blobs(blocks)
        return header_bytes(blobs, {}) + sum(blob.nbytes for blob in blobs)

    def prefix(self, size: int | str) -> int:
        """The most blocks with which the weight file takes at most `size` bytes.

        Raises
        ------
        FeatherError
            The smallest model of the stack is larger, or `size` is none.
        """
        budget = parse_size(size, "--size") if isinstance(size, str) else size
        least = self.nbytes(0)
        if budget < least:
            raise FeatherError(
                f"{size_text(budget)} is less than the smallest model of the stack {self.folder}, which takes "
                f"{size_text(least)} ({least} bytes): allow as much"
            )
        low, high = 0, self.blocks
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.nbytes(middle) <= budget else (low, middle - 1)
        return low

    def _sequence(self, entry: dict[str, Any]) -> tuple[str, ...]:
        modules, places = entry.get("modules"), entry.get("blocks")
        if not isinstance(modules, list) or not isinstance(places, list) or not all(type(p) is int for p in places):
            raise self._damaged("its index names no modules and blocks")
        if not all(0 <= place < len(modules) for place in places):
            raise self._damaged("its index has a block of no module")
        stacked = {module: blocks_in(spec) for module, spec in self.specs.items() if blocks_in(spec) > 1}
        if len(set(map(str, modules))) != len(modules) or set(map(str, modules)) != set(stacked):
            raise self._damaged("its index and config.json name other modules")
        found = tuple(str(modules[place]) for place in places)
        counts = dict.fromkeys(stacked, 1)
        for module in found:
            counts[module] += 1
        if counts != stacked:
            wrong = next(module for module in stacked if counts[module] != stacked[module])
            raise self._damaged(f"its index has {counts[wrong]} blocks of {wrong[:120]}, which has {stacked[wrong]}")
        return found

    def _check_files(self) -> None:
        """The second file must hold the blocks one behind the other, so that a prefix can be read alone."""
        expected = [f"{module}.{name}" for module, name in self._block_names()]
        missing = next((name for name in expected if not self.checkpoint.has(name)), None)
        if missing is not None:
            raise self._damaged(f"it lacks the tensor {missing[:120]!r}")
        if expected and list(self.checkpoint.file_of(expected[0]).entries) != expected:
            raise self._damaged("its blocks do not lie in the order of its index")

    def _block_names(self) -> Iterator[tuple[str, str]]:
        return block_names(self.specs, self.sequence)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"the stack {self.folder} is damaged ({what}): make or download it again")


def block_names(specs: dict[str, dict[str, Any]], sequence: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Module and tensor of all that the blocks of a sequence add, block by block."""
    levels: dict[str, int] = {}
    for module in sequence:
        level = levels.get(module, 1)
        before = {cut.tensor for cut in code_prefix(specs[module], level)[1].values()}
        levels[module] = level + 1
        for cut in code_prefix(specs[module], level + 1)[1].values():
            if cut.tensor not in before:
                yield module, cut.tensor
