"""A model folder in memory, so that thousands of mutants of it cost no more than writing them.

The reader and writer of safetensors here check nothing: mutations need to read and write what a checking one refuses.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HASHES = "featherweight.sha256"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Unreadable(ValueError):
    """An earlier mutation has left nothing that this one could work on."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it: dtype in the format's words, bytes row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def row_bytes(self) -> int:
        return len(self.data) // self.shape[0] if self.shape and self.shape[0] else 0


@dataclass
class Shard:
    """One safetensors file."""

    tensors: list[Stored]
    metadata: dict[str, Any] | None = None

    @classmethod
    def parse(cls, content: bytes) -> Shard:
        try:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            metadata = header.pop("__metadata__", None)
            tensors = []
            for name, entry in header.items():
                first, last = (8 + length + offset for offset in entry["data_offsets"])
                tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), content[first:last]))
        except Exception as error:
            raise Unreadable(str(error)) from error
        return cls(tensors, metadata)

    def dump(self) -> bytes:
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        place = 0
        for tensor in self.tensors:
            end = place + len(tensor.data)
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
            place = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + b"".join(tensor.data for tensor in self.tensors)


@dataclass
class Files:
    """content: bytes of each file; folders: names of folders in it."""

    content: dict[str, bytes]
    folders: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Files:
        return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})

    def copy(self) -> Files:
        return Files(dict(self.content), list(self.folders))

    def write(self, folder: Path) -> None:
        """Make `folder` hold this and nothing else."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in self.folders:
            (folder / name).mkdir()
        for name, content in self.content.items():
            if name not in self.folders:
                (folder / name).write_bytes(content)

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.content if name.endswith(".safetensors"))

    def shard(self, name: str) -> Shard:
        return Shard.parse(self.content[name])

    def tensors(self) -> dict[str, Stored]:
        """All tensors of all shards."""
        return {tensor.name: tensor for name in self.shards for tensor in self.shard(name).tensors}

    def place(self, tensor: str) -> str:
        """The file that holds a tensor."""
        for name in self.shards:
            if any(one.name == tensor for one in self.shard(name).tensors):
                return name
        raise Unreadable(tensor)

    def put(self, name: str, shard: Shard) -> None:
        self.content[name] = shard.dump()

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.content[name])
        except (KeyError, ValueError) as error:
            raise Unreadable(name) from error

    def put_json(self, name: str, value: Any) -> None:
        self.content[name] = json.dumps(value, indent=1).encode()

    def config(self) -> dict[str, Any]:
        return self.object("config.json")

    def object(self, name: str) -> dict[str, Any]:
        found = self.json(name)
        if not isinstance(found, dict):
            raise Unreadable(name)
        return found

    def damaged(self) -> list[str]:
        """Tensors whose bytes are not those that the hash in their file promises."""
        found = []
        for name in self.shards:
            try:
                shard = self.shard(name)
                hashes = json.loads((shard.metadata or {}).get(HASHES, "{}"))
                found += [
                    tensor.name
                    for tensor in shard.tensors
                    if tensor.name in hashes and hashlib.sha256(tensor.data).hexdigest() != hashes[tensor.name]
                ]
            except (Unreadable, ValueError, TypeError, AttributeError):
                continue
        return found


def split(files: Files, count: int = 3) -> Files:
    """The same model in `count` shards with an index; each shard keeps the hashes of its own tensors."""
    whole = files.shard(SINGLE)
    result = files.copy()
    del result.content[SINGLE]
    placed, total = {}, 0
    for number in range(count):
        part = whole.tensors[number::count]
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        metadata = copy.deepcopy(whole.metadata)
        if metadata and HASHES in metadata:
            hashes = json.loads(metadata[HASHES])
            metadata[HASHES] = json.dumps({tensor.name: hashes[tensor.name] for tensor in part})
        result.put(name, Shard(part, metadata))
        placed |= {tensor.name: name for tensor in part}
        total += sum(len(tensor.data) for tensor in part)
    result.put_json(INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return result


def renamed(tensors: Iterable[Stored], names: dict[str, str]) -> list[Stored]:
    return [replace(tensor, name=names.get(tensor.name, tensor.name)) for tensor in tensors]
