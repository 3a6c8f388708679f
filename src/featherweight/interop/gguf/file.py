"""A model in GGUF, open: one file, or all parts of one that was split, mapped and read lazily."""

from __future__ import annotations

import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.header import MAGIC, Header, TensorInfo, read_header
from featherweight.storage.checkpoint.resolve import refuse_lfs_pointer

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
SUFFIX = ".gguf"

Bytes = npt.NDArray[np.uint8]


class GGUFFile:
    """One file, mapped, with its checked header.

    path, header, size : of the file
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_lfs_pointer(path)
        try:
            with path.open("rb") as stream:
                info = os.fstat(stream.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise CheckpointError(f"{path} is not a regular file")
                if info.st_size == 0:
                    raise CheckpointError(f"{path} is empty: download it again")
                self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        self.size = info.st_size
        with memoryview(self._mapping) as content:
            self.header: Header = read_header(path, content)

    def rows(self, tensor: TensorInfo, first: int, last: int) -> Bytes:
        """Bytes of rows `first` to `last` (exclusive), uint8 [rows, bytes of a row]; a view of the mapped file."""
        per_row = tensor.type.bytes_of(tensor.shape[-1])
        start, count = tensor.start + first * per_row, (last - first) * per_row
        flat: Bytes = np.frombuffer(self._mapping, np.uint8, count, start)
        return flat.reshape(last - first, per_row)

    def release(self, tensor: TensorInfo) -> None:
        """Give the pages of a tensor back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = tensor.start - tensor.start % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, first, min(tensor.start + tensor.nbytes, self.size) - first)


@dataclass(frozen=True)
class Stored:
    """A tensor and the file that has it."""

    file: GGUFFile
    info: TensorInfo

    @property
    def count(self) -> int:
        """Rows, of all dimensions but the last."""
        return self.info.nbytes // self.info.type.bytes_of(self.info.shape[-1])

    def rows(self, first: int, last: int) -> Bytes:
        return self.file.rows(self.info, first, last)


class GGUFModel:
    """All parts of a model.

    path : as it was named
    metadata : of the first part
    tensors : by name, over all parts
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [GGUFFile(part) for part in parts_of(path)]
        self.metadata: dict[str, Any] = self.files[0].header.metadata
        self.tensors: dict[str, Stored] = {}
        _check_parts(path, self.files)
        for file in self.files:
            for name, info in file.header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file.path} has the tensor {shown(name)}, which {self.tensors[name].file.path.name} has, too"
                    )
                self.tensors[name] = Stored(file, info)
        claimed = self.metadata.get("split.tensors.count", len(self.tensors))
        if claimed != len(self.tensors):
            raise CheckpointError(
                f"the parts of {path} have {len(self.tensors)} tensors, and {shown(claimed)} are claimed: download "
                "them again"
            )

    def close(self) -> None:
        """Give the mappings up; they end with the last array that shows their bytes."""
        self.files.clear()
        self.tensors.clear()


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def parts_of(path: Path) -> list[Path]:
    """The files of a model of which one is named, in their order. CheckpointError where one is not there."""
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) < 2:
        return [path]
    count = int(named["count"])
    parts = [path.with_name(f"{named['stem']}-{k:05d}-of-{count:05d}{path.suffix}") for k in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path} is one of {count} parts, and {missing[0]}{more} is not there: all parts belong in one folder"
        )
    return parts


def _check_parts(path: Path, files: list[GGUFFile]) -> None:
    """CheckpointError where the files are not the parts that their metadata says."""
    for number, file in enumerate(files):
        count = file.header.metadata.get("split.count", 1)
        found = file.header.metadata.get("split.no", 0)
        if type(count) is not int or type(found) is not int or (count > 1 and len(files) == 1):
            raise CheckpointError(
                f"{file.path} is part {shown(found)} of {shown(count)}, and its name does not say so: name the parts "
                "as they were, NAME-00001-of-00002.gguf and so on"
            )
        if len(files) > 1 and (count, found) != (len(files), number):
            raise CheckpointError(
                f"{file.path} says that it is part {found + 1} of {count}, and its name says {number + 1} of "
                f"{len(files)}"
            )
