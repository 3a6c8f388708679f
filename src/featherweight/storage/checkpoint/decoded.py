"""A folder of codes seen as the plain model that they stand for, decoded as it is read.

What reads a checkpoint then reads a compressed one: a second compression, statistics, another format. Rows are decoded
when they are asked for; no more than one tensor is ever kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD
from featherweight.storage.checkpoint.safetensors_file import Entry, SafetensorsFile
from featherweight.storage.checkpoint.size import OriginalView
from featherweight.storage.checkpoint.stored_code import read_code
from featherweight.storage.checkpoint.writer import blob_of
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import DTYPES, WHOLE_BYTES, input_rounding

WINDOW_BYTES = 1 << 20
"""Of float32 values that are decoded at a time where a whole matrix is wanted."""
TEMPORARY = 7
"""A decoder's own memory, in sizes of the float32 values that it makes. Measured on windows of 8 MiB of a matrix [4096,
1024]: 6.1 for pyramid codes behind a rotation, 4.0 for uniform ones, less than 1 for planes of trits."""


def is_coded(checkpoint: Checkpoint) -> bool:
    """Whether a folder has codes of ours."""
    return (checkpoint.quantization_config or {}).get("quant_method") == METHOD


class DecodedCheckpoint(Checkpoint):
    """A checkpoint whose compressed modules are tensors of float32 values, in the layout of the original.

    Of a compressed module `m` there is `m.weight`, of slices `m[0]`, `m[1]`, ... the stacked tensor `m`. All that is
    not compressed is as it is stored, and so are codes of the kind `dense`, whose values are plain. Threads may share
    it.

    Parameters
    ----------
    coded : Checkpoint
        The folder, open; closed with this.
    shapes : Mapping[str, tuple[int, ...]]
        Of compressed tensors in the original, where they are known not to be [out, in] and no family's file says so:
        a convolution's kernel, a transposed matrix.
    named : Path, optional
        What the user calls it, where the folder was made of that.

    Raises
    ------
    CheckpointError
        The folder's codes cannot be read, or it has none of ours.
    """

    def __init__(
        self, coded: Checkpoint, shapes: Mapping[str, tuple[int, ...]] | None = None, named: Path | None = None
    ) -> None:
        self.coded, self.folder, self.files = coded, coded.folder, coded.files
        config = coded.quantization_config or {}
        self.config = {key: value for key, value in coded.config.items() if key != "quantization_config"}
        self._ignores_method, self._config_bytes = False, coded._config_bytes
        self._view = OriginalView(coded, shapes)
        self.names = self._view.names
        self.renamed = {name: name for name in self.names}
        self._check_slices()
        anatomy = self._view.anatomy()
        self._turned: set[str] = set()
        self._entries = {name: self._described(name, name in (shapes or {})) for name in self._view.compressed}
        for layer in (*anatomy.layers, *anatomy.outside) if anatomy else ():
            if layer.transposed and layer.tensor in self._entries and layer.tensor not in self._turned:
                self._turn(layer.tensor)
        for name in [name for name in self._entries if self._is_plain(name)]:
            del self._entries[name]
        self.given_biases = frozenset(
            [*(m for m, spec in self._view.specs.items() if spec.get("bias") is True), *_names(config.get("biases"))]
        )
        self.bits_per_weight = self._bits(anatomy)
        self.recipe = dict(found) if isinstance(found := config.get("recipe"), dict) else {}
        self.said = self._said(named or coded.folder)
        self.notes = (*coded.notes, *self.said)
        self._lock = threading.Lock()
        self._kept: tuple[tuple[str, int | None], Tensor] | None = None
        self._code: tuple[str, Code] | None = None

    @property
    def origin(self) -> str:
        """What the folder was read from, as an importer says it; else empty."""
        return str(self.recipe.get("notes", "")) if self.recipe.get("name") == "imported" else ""

    @property
    def compressed(self) -> tuple[str, ...]:
        """Names of the tensors that are decoded."""
        return tuple(self._entries)

    def _check_slices(self) -> None:
        for tensor, modules in self._view.compressed.items():
            for number, module in enumerate(modules):
                if module not in (f"{tensor}[{number}]", tensor.removesuffix(".weight")):
                    raise CheckpointError(
                        f"config.json of {self.folder} has a code for {module}, but none for {tensor}[{number}]: "
                        "restore config.json"
                    )

    def _is_plain(self, name: str) -> bool:
        """Whether it is stored as plain values under this very name, in the original's layout."""
        module = self._view.compressed[name][0]
        dense = self._view.specs[module].get("kind") == "dense" and self._view.stored[module] == (name,)
        return dense and name not in self._turned and self._entries[name].shape == self._matrix(name)

    def _described(self, name: str, known: bool) -> Entry:
        """known : the shape is the original's, which tells of all but square matrices how they lie"""
        shape, matrix = self._view.entry(name).shape, self._matrix(name)
        if known and (len(shape) == 2 or self._stacked(name)) and shape[-2:] == matrix[::-1] != matrix:
            self._turned.add(name)
        return Entry("F32", shape, 0, 4 * math.prod(shape))

    def _turn(self, name: str) -> None:
        """Say of a tensor that the original has it as [in, out]."""
        shape = self._entries[name].shape
        self._entries[name] = Entry("F32", (*shape[:-2], *shape[:-3:-1]), 0, 4 * math.prod(shape))
        self._turned.add(name)

    def _matrix(self, name: str) -> tuple[int, ...]:
        """Shape [out, in] of the codes."""
        return tuple(self._view.specs[self._view.compressed[name][0]]["shape"])

    def _bits(self, anatomy: Anatomy | None) -> float:
        """Bits a weight of what is decoded, embedding and output layer not among it unless there is nothing else."""
        outside = {layer.tensor for layer in anatomy.outside} if anatomy else set()
        counted = [name for name in self._entries if name not in outside] or list(self._entries)
        weights = sum(self._entries[name].elements for name in counted)
        return 8 * sum(self._view.stored_bytes(name) for name in counted) / max(1, weights)

    def _said(self, named: Path) -> tuple[str, ...]:
        if not self._entries:
            return ()
        what = f"imported from {self.origin}" if self.origin else f"recipe {self.recipe.get('name', 'unknown')}"
        said = (
            f"{named} is compressed already ({what}, {self.bits_per_weight:.2f} bits a weight): what is lost adds to "
            "what it has lost before"
        )
        if not any(input_rounding(spec) for spec in self._view.specs.values()):
            return (said,)
        return (said, f"layers of {named} round their inputs: those that are compressed anew do so no longer")

    # What a checkpoint is asked ---------------------------------------------------------------------------------------

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return self.coded.total_bytes

    def has(self, name: str) -> bool:
        return name in self.renamed

    def file_of(self, name: str) -> SafetensorsFile:
        return self.coded.file_of(self._stored_names(name)[0])

    def entry(self, name: str) -> Entry:
        return self._entries.get(name) or self.coded.entry(name)

    def stored_bytes(self, name: str) -> int:
        return self._view.stored_bytes(name) if name in self.renamed else self.coded.entry(name).nbytes

    def codes_of(self, name: str) -> dict[str, dict[str, Any]]:
        return {m: self._view.specs[m] for m in self._view.compressed[name]} if name in self._entries else {}

    def stored_as(self, name: str) -> tuple[Checkpoint, tuple[str, ...]]:
        return self.coded, self._stored_names(name)

    def plain_dtype(self, name: str) -> torch.dtype:
        """Of what is decoded: the type of which config.json says the model is."""
        if name not in self._entries:
            return super().plain_dtype(name)
        text = self.config.get("text_config")
        parts = (self.config, text if isinstance(text, dict) else {})
        named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if key in part), None)
        return DTYPES.get(named, torch.float32) if isinstance(named, str) else torch.float32

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, for reading only; kept until it is released or another one is asked for."""
        if name not in self._entries:
            return self.coded.tensor(name)
        return self._held(name, None)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        if name not in self._entries:
            return self.coded.rows(name, first, last)
        shape = self._entries[name].shape
        if not 0 <= first <= last <= shape[0]:
            raise IndexError(f"{name} of shape {list(shape)} has no rows {first}:{last}")
        if self._stacked(name):
            if last - first == 1:
                return self._held(name, first)[None]
            found = torch.empty(last - first, *shape[1:])
            for number in range(first, last):
                self._slice(name, number, found[number - first])
            return found
        if name in self._turned:
            return self._held(name, None)[first:last]
        return self._code_of(self._view.compressed[name][0]).decode_rows(first, last).view(last - first, *shape[1:])

    def release(self, name: str, first: int | None = None, last: int | None = None) -> None:
        """Pages of codes are shared between rows: they go with the last of them."""
        if name not in self._entries:
            self.coded.release(name, first, last)
            return
        if last is not None and last < self._entries[name].shape[0] and not self._stacked(name):
            return
        with self._lock:
            self._kept = None if self._kept is not None and self._kept[0][0] == name else self._kept
            self._code = None
        modules = self._view.compressed[name]
        for module in modules[first:last] if self._stacked(name) else modules:
            for stored in self._view.stored[module]:
                self.coded.release(stored)

    def raw_windows(self, name: str, window_bytes: int = 16 << 20) -> Iterator[memoryview]:
        if name not in self._entries:
            yield from self.coded.raw_windows(name, window_bytes)
            return
        entry = self._entries[name]
        step = max(1, window_bytes * entry.shape[0] // max(1, entry.nbytes))
        for first in range(0, entry.shape[0], step):
            last = min(entry.shape[0], first + step)
            yield from blob_of(name, self.rows(name, first, last)).chunks()
            self.release(name, first, last)

    def close(self) -> None:
        with self._lock:
            self._kept = self._code = None
        self.coded.close()

    def reading_bytes(self, name: str, window_bytes: int) -> int:
        """The pages of its codes, and what decoders take for themselves."""
        if name not in self._entries:
            return 0
        return self._view.stored_bytes(name) + TEMPORARY * max(window_bytes, WINDOW_BYTES)

    # Decoding ---------------------------------------------------------------------------------------------------------

    def _stored_names(self, name: str) -> tuple[str, ...]:
        if name not in self._entries:
            return (name,)
        return tuple(stored for module in self._view.compressed[name] for stored in self._view.stored[module])

    def _stacked(self, name: str) -> bool:
        return self._view.compressed[name][0] != name.removesuffix(".weight")

    def _code_of(self, module: str) -> Code:
        """The last one is kept, for scales that are decoded once."""
        with self._lock:
            if self._code is not None and self._code[0] == module:
                return self._code[1]
        code = read_code(self.coded, module, self._view.specs[module])
        with self._lock:
            self._code = (module, code)
        return code

    def _held(self, name: str, number: int | None) -> Tensor:
        """A tensor, or one slice of it; the last one is kept."""
        with self._lock:
            if self._kept is not None and self._kept[0] == (name, number):
                return self._kept[1]
            self._kept = None
        if number is None and self._stacked(name):
            found = torch.empty(self._entries[name].shape)
            for place in range(len(found)):
                self._slice(name, place, found[place])
        else:
            found = self._slice(name, number or 0)
        with self._lock:
            self._kept = ((name, number), found)
        return found

    def _slice(self, name: str, number: int, into: Tensor | None = None) -> Tensor:
        """One matrix in the original's layout, decoded a window of rows at a time."""
        code, turned = self._code_of(self._view.compressed[name][number]), name in self._turned
        rows, columns = code.shape
        made = torch.empty((columns, rows) if turned else (rows, columns)) if into is None else into
        matrix = made.t() if turned else made
        step = max(1, WINDOW_BYTES // (4 * columns) // WHOLE_BYTES) * WHOLE_BYTES
        for first in range(0, rows, step):
            last = min(rows, first + step)
            matrix[first:last] = code.decode_rows(first, last)
        shape = self._entries[name].shape
        return made if self._stacked(name) else made.view(shape)


def _names(found: Any) -> list[str]:
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
