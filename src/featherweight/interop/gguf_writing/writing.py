"""A GGUF file, tensor by tensor: header and metadata first, then the bytes of rows as they are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import gguf
import numpy as np

from featherweight.interop.gguf_writing.block_types import BlockType, Bytes

PADDING = 32


@dataclass(frozen=True)
class Item:
    """A tensor of the file.

    name, shape : there; the last dimension is that of a row
    type : of its blocks
    rows : makes its bytes, some rows [n, bytes of a row] at a time; called once
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    rows: Callable[[], Iterator[Bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.type.weights * self.type.nbytes


@contextmanager
def header(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer that metadata can be added to; closed in the end."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        yield writer
    finally:
        writer.close()


def write_file(writer: gguf.GGUFWriter, items: list[Item], told: Callable[[Item, int], None]) -> None:
    """Write what was added to `writer`, and all tensors; the disk has it when this returns.

    told : called with a tensor and the bytes of it that were written

    Raises OSError, and whatever the rows raise.
    """
    for item in items:
        kind = cast(gguf.GGMLQuantizationType, item.type.number)  # releases of the package differ in what they name
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    stream = cast(BinaryIO, writer.fout[0])
    _pad(stream)
    for item in items:
        begin = stream.tell()
        for rows in item.rows():
            stream.write(np.ascontiguousarray(rows).data)
            told(item, rows.nbytes)
        assert stream.tell() - begin == item.nbytes, item.name
        _pad(stream)
    stream.flush()
    os.fsync(stream.fileno())


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % PADDING))
