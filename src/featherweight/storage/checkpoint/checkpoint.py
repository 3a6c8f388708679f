"""A source checkpoint: a folder of safetensors and a config.json, read lazily and never loaded as a whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import CheckpointError, shown
from featherweight.storage.checkpoint.accounting import BUFFERS, CODES
from featherweight.storage.checkpoint.anatomy.tensor_index import FLOATING
from featherweight.storage.checkpoint.format import METHOD
from featherweight.storage.checkpoint.prefixes import unwrapped
from featherweight.storage.checkpoint.resolve import ADAPTER_CONFIG, PICKLE_SUFFIXES, Place, refuse_lfs_pointer, resolve
from featherweight.storage.checkpoint.safetensors_file import Entry, SafetensorsFile
from featherweight.storage.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Shards, find_shards, parse_object
from featherweight.system.transformers_calls import knows_quant_method

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint"]

COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
COPIED_NAMES = re.compile(r"(tokenizer|vocab|merges|licen[cs]e|notice|use_policy)", re.IGNORECASE)
FOREIGN_SUFFIXES = (".safetensors", ".onnx", ".gguf", ".h5", ".msgpack", ".tflite", ".ot", ".npz", ".mlmodel")
ADAPTER_NAME = re.compile(r"adapter_(config|model)\b")  # in an output they would name weights that are not there
COMPARED_BYTES = 16 << 20


class Checkpoint:
    """A model's weights and configuration, as they lie on disk.

    Attributes
    ----------
    folder : Path
    config : dict, the content of config.json
    files : tuple[SafetensorsFile, ...], the shards in the order of their names
    names : tuple[str, ...], all tensors by shard and, within it, by offset; without the prefix of a wrapper
    notes : tuple[str, ...], what is odd about the folder, a sentence each
    trust_remote_code : bool, whether the code that the folder brings for its class or tokenizer may run; False at first
    given_biases : frozenset[str], names of linear modules to which an earlier compression gave a bias that their class
        lacks
    """

    trust_remote_code = False
    given_biases: frozenset[str] = frozenset()

    def __init__(
        self, folder: Path, config_bytes: bytes, files: tuple[SafetensorsFile, ...], notes: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.config: dict[str, Any] = parse_object(folder / "config.json", config_bytes)
        self.files = files
        self._config_bytes = config_bytes
        place: dict[str, SafetensorsFile] = {}
        twice: list[str] = []
        for file in files:
            twice += [name for name in file.entries if name in place]
            place |= dict.fromkeys(file.entries, file)  # of two, the later one counts, as in transformers
        if twice:
            notes += (f"tensor {twice[0]!r} is in two shards of {folder}: that in {place[twice[0]].path.name} is used",)
        self._ignores_method = self._plain_under_unknown_method(place)
        if self._ignores_method:
            method = shown(self.config["quantization_config"]["quant_method"])
            notes += (
                f"config.json of {folder} names the quant_method {method}, which nobody here knows, and all of its "
                "tensors are plain numbers: they are read as the model's weights, as transformers does",
            )
        coded = (self.quantization_config or {}).get("quant_method") == METHOD  # our own names have no wrapper
        self.renamed = {name: name for name in place} if coded else unwrapped(place)
        self._stored = {name: stored for stored, name in self.renamed.items()}
        self._file_of = {name: place[stored] for name, stored in self._stored.items()}
        self.names = tuple(self._file_of)
        if any(name != stored for name, stored in self._stored.items()):
            first = next((name, stored) for name, stored in self._stored.items() if name != stored)
            notes += (f"the tensors of {folder} carry a wrapper's prefix: {first[1]!r} is read as {first[0]!r}",)
        self.notes = notes

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Open a local folder, one .safetensors file with its config.json beside it, or a model on the hub.

        Raises CheckpointError, in one sentence, for whatever keeps the model from being read.
        """
        return cls.at(resolve(model, revision=revision, token=token))

    @classmethod
    def at(cls, place: Place) -> Checkpoint:
        """Open what `resolve` has found."""
        config = _read_config(place.folder)
        parse_object(place.folder / "config.json", config)  # its faults come before those of the weights
        shards = find_shards(place.folder) if place.file is None else Shards((place.file.name,), {})
        if (place.folder / ADAPTER_CONFIG).exists():
            note = f"{place.folder} holds an adapter beside a whole model: the model is used without it"
            shards = replace(shards, notes=(*shards.notes, note))
        return cls._open_shards(place.folder, config, shards)

    @classmethod
    def _open_shards(cls, folder: Path, config: bytes, shards: Shards) -> Checkpoint:
        files: list[SafetensorsFile] = []
        try:
            for name in shards.names:
                refuse_lfs_pointer(folder / name)
                files.append(SafetensorsFile.open(folder / name))
            there = {file.path.name: file.entries for file in files}
            lost = [tensor for tensor, shard in shards.placed.items() if tensor not in there[shard]]
            note = f"{folder / INDEX_NAME} places tensor {lost[0]!r} in a shard that lacks it" if lost else ""
            checkpoint = cls(folder, config, tuple(files), (*shards.notes, note) if note else shards.notes)
            if not checkpoint.names:
                raise CheckpointError(f"{folder} has no weights: its safetensors files hold no tensor")
            return checkpoint
        except BaseException:
            for file in files:
                file.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says about an earlier compression; None for a plain model."""
        found = self.config.get("quantization_config")
        if self._ignores_method:
            return None
        if not found:  # another tool's older name
            found = self.config.get("compression_config")
            if isinstance(found, dict) and found.get("quant_method") == METHOD:
                return None  # nobody reads ours under that name
        return found if isinstance(found, dict) else None

    @property
    def has_codes(self) -> bool:
        """Whether a tensor, by its name or type, holds codes in place of the model's own numbers."""
        return _has_codes({stored: self._file_of[name] for name, stored in self._stored.items()})

    def _plain_under_unknown_method(self, place: dict[str, SafetensorsFile]) -> bool:
        """Whether config.json names a method that transformers skips, and no tensor is of a type that codes have."""
        found = self.config.get("quantization_config")
        found = found if isinstance(found, dict) else {}
        method = found.get("quant_method")
        if not isinstance(method, str) or method == METHOD or found.get("load_in_8bit") or found.get("load_in_4bit"):
            return False
        return not _has_codes(place) and not knows_quant_method(method)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(self.entry(name).nbytes for name in self.names)

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(self.entry(name).elements for name in self.names)

    def has(self, name: str) -> bool:
        return name in self._file_of

    def stored_bytes(self, name: str) -> int:
        """Bytes that stand for a tensor in the folder: its own, or those of its codes."""
        return self.entry(name).nbytes

    def stored_as(self, name: str) -> tuple[Checkpoint, tuple[str, ...]]:
        """A checkpoint that has the bytes that stand for a tensor, and their names there: its own, or its codes'."""
        return self, (name,)

    def codes_of(self, name: str) -> dict[str, dict[str, Any]]:
        """Module -> spec of the codes that a tensor is stored as; empty for plain values."""
        return {}

    def reading_bytes(self, name: str, window_bytes: int) -> int:
        """Memory that reading windows of rows takes beside the window and its pages."""
        return 0

    def plain_dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored if its values change."""
        return self.entry(name).torch_dtype

    def file_of(self, name: str) -> SafetensorsFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}") from None

    def entry(self, name: str) -> Entry:
        return self.file_of(name).entry(self._stored[name])

    def tensor(self, name: str) -> torch.Tensor:
        """See SafetensorsFile.tensor."""
        return self.file_of(name).tensor(self._stored[name])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """See SafetensorsFile.rows."""
        return self.file_of(name).rows(self._stored[name], first, last)

    def release(self, name: str, first: int | None = None, last: int | None = None) -> None:
        """See SafetensorsFile.release."""
        self.file_of(name).release(self._stored[name], first, last)

    def raw_windows(self, name: str, window_bytes: int = 16 << 20) -> Iterator[memoryview]:
        """See SafetensorsFile.raw_windows."""
        return self.file_of(name).raw_windows(self._stored[name], window_bytes)

    def differ(self, one: str, other: str) -> bool:
        """Whether two tensors hold different values. Reads both up to the first window that differs."""
        first, second = self.entry(one), self.entry(other)
        if first.shape != second.shape:
            return True
        rows = first.shape[0] if first.shape else 0
        step = max(1, COMPARED_BYTES * rows // max(1, first.nbytes))
        for start in range(0, rows, step):
            end = min(rows, start + step)
            pair = (self.rows(one, start, end), self.rows(other, start, end))
            same = torch.equal(*pair) if pair[0].dtype == pair[1].dtype else torch.equal(*(t.float() for t in pair))
            self.release(one, start, end)
            self.release(other, start, end)
            if not same:
                return True
        return False

    def other_files(self) -> tuple[Path, ...]:
        """What belongs beside the weights: tokenizer, templates, generation config, code, licence; sorted by name.

        Not among them: config.json (whoever writes an output amends it), weights of any format, their index, README,
        and the description of an adapter, whose weights are not the model's.
        """
        return tuple(sorted(path for path in self.folder.iterdir() if _belongs_beside_weights(path)))

    def identity(self) -> str:
        """sha256 (hex) over config.json and every shard's name, size and header: which model it is.

        Weights changed in place under an unchanged header are not noticed.
        """
        digest = hashlib.sha256(hashlib.sha256(self._config_bytes).digest())
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.size}\0{file.header_sha256}\n".encode())
        return digest.hexdigest()


def _has_codes(place: dict[str, SafetensorsFile]) -> bool:
    """Whether a tensor, by its name or type, holds codes in place of a model's own numbers."""
    kinds = {name: file.entries[name].dtype for name, file in place.items() if not BUFFERS.search(name)}
    return any(CODES.search(name) or dtype not in FLOATING for name, dtype in kinds.items())


def _read_config(folder: Path) -> bytes:
    try:
        return (folder / "config.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error.strerror or error}") from error


def _belongs_beside_weights(path: Path) -> bool:
    name, suffix = path.name, path.suffix.lower()
    if name.startswith(".") or name == "config.json" or name.lower().startswith("readme") or not path.is_file():
        return False
    if suffix in PICKLE_SUFFIXES or suffix in FOREIGN_SUFFIXES or name.endswith(".index.json"):
        return False
    if ADAPTER_NAME.match(name):
        return False
    return suffix in COPIED_SUFFIXES or COPIED_NAMES.match(name) is not None
