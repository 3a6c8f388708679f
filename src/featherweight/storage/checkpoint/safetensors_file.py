"""One safetensors file, memory-mapped and read lazily.

The format: 8 bytes little-endian header length, a JSON header that names dtype, shape and byte range of every tensor,
then the tensors' bytes without gaps (https://huggingface.co/docs/safetensors, section "Format"). The parser is our own
because three things are needed that the library does not offer: errors that say what is wrong with a file, windows of
rows, and giving pages back so that resident memory stays bounded while a model larger than memory is walked.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from featherweight.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # what torch's iterators support
MAX_ELEMENTS = 2**63 - 1

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` is the byte offset from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch; a CheckpointError where the installed torch lacks it."""
        found = getattr(torch, TORCH_NAMES[self.dtype], None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"torch {torch.__version__} has no dtype for {self.dtype}; install a newer torch")
        return found


class SafetensorsFile:
    """A validated, memory-mapped safetensors file. Threads may share it; tensors stay valid after `close`.

    Attributes
    ----------
    path : Path
    entries : dict[str, Entry], in the order of their bytes
    metadata : dict[str, str], the header's `__metadata__`
    size : int, bytes of the file
    header_sha256 : str, digest of the length field and the header
    """

    def __init__(self, path: Path, size: int, header: bytes, mapping: mmap.mmap) -> None:
        self.path = path
        self.size = size
        self.metadata, self.entries = _parse_header(path, size, header)
        self.header_sha256 = hashlib.sha256(len(header).to_bytes(8, "little") + header).hexdigest()
        self._mapping: mmap.mmap | None = mapping
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Map the file and check all that its header claims. Raises CheckpointError, naming the file, otherwise."""
        path = Path(path)
        try:
            with path.open("rb") as stream:
                info = os.fstat(stream.fileno())
                if not stat.S_ISREG(info.st_mode):
                    _refuse(path, "it is not a regular file")
                header = _read_header(path, stream.read, info.st_size)
                mapping = _map_privately(stream.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            return cls(path, info.st_size, header, mapping)
        except BaseException:
            mapping.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the mapping up. Tensors already handed out keep it alive until the last of them is gone.

        It is dropped, not closed: torch.frombuffer holds the object but not its buffer, so that mmap.close would unmap
        the memory under living tensors.
        """
        with self._lock:
            self._mapping = None

    def entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}") from None

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, without a copy. For reading only: what is written is lost, the file never changes."""
        entry = self.entry(name)
        return self._view(entry, entry.shape, entry.start)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of the leading dimension, without a copy."""
        entry = self.entry(name)
        row_bytes = self._check_rows(name, entry, first, last)
        return self._view(entry, (last - first, *entry.shape[1:]), entry.start + first * row_bytes)

    def release(self, name: str, first: int | None = None, last: int | None = None) -> None:
        """Drop the resident pages of a tensor, or of its rows `first` to `last`. Reading them again is allowed."""
        entry = self.entry(name)
        start, nbytes = entry.start, entry.nbytes
        if first is not None or last is not None:
            first, last = first or 0, entry.shape[0] if last is None and entry.shape else last or 0
            row_bytes = self._check_rows(name, entry, first, last)
            start, nbytes = entry.start + first * row_bytes, (last - first) * row_bytes
        self._drop_pages(start, nbytes)

    def raw_windows(self, name: str, window_bytes: int = 16 << 20) -> Iterator[memoryview]:
        """The tensor's bytes as consecutive memoryviews of at most `window_bytes`, dropping the pages behind."""
        if window_bytes < 1:
            raise ValueError(f"window_bytes must be positive, not {window_bytes}")
        entry = self.entry(name)
        end = entry.start + entry.nbytes
        for start in range(entry.start, end, window_bytes):
            stop = min(start + window_bytes, end)
            with memoryview(self._mapped()) as whole, whole[start:stop] as window:
                yield window.toreadonly()
            self._drop_pages(start, stop - start)

    def _mapped(self) -> mmap.mmap:
        mapping = self._mapping
        if mapping is None:
            raise CheckpointError(f"{self.path} has been closed")
        return mapping

    def _view(self, entry: Entry, shape: tuple[int, ...], start: int) -> torch.Tensor:
        dtype, mapping, count = entry.torch_dtype, self._mapped(), math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        item = ITEM_BYTES[entry.dtype]
        if start % item:  # nothing obliges a writer to align its data; a misaligned element needs a copy
            raw = torch.frombuffer(mapping, dtype=torch.uint8, count=count * item, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)

    def _check_rows(self, name: str, entry: Entry, first: int, last: int) -> int:
        if not entry.shape or not 0 <= first <= last <= entry.shape[0]:
            raise IndexError(f"{name} of shape {list(entry.shape)} has no rows {first}:{last}")
        return entry.nbytes // entry.shape[0] if entry.shape[0] else 0

    def _drop_pages(self, start: int, nbytes: int) -> None:
        """Rounded outwards: a neighbour's page that goes too is simply read again."""
        if nbytes <= 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = start - start % mmap.PAGESIZE
        with self._lock:  # against a close in between
            if self._mapping is not None:
                self._mapping.madvise(mmap.MADV_DONTNEED, first, min(start + nbytes, self.size) - first)


def _map_privately(descriptor: int) -> mmap.mmap:
    """A copy-on-write mapping: torch wants writable buffers, and a stray in-place operation must not reach the file.

    Without MAP_NORESERVE Linux would refuse to map a file larger than the machine's memory in this mode.
    """
    if sys.platform != "linux":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is not a valid safetensors file: {reason}")


def _read_header(path: Path, read: Any, size: int) -> bytes:
    if size < 8:
        _refuse(path, f"it is truncated, {size} bytes where the length of the header alone takes 8")
    length = int.from_bytes(read(8), "little")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > size - 8:
        _refuse(path, f"it is truncated, {length - (size - 8)} bytes of its header are missing")
    header: bytes = read(length)
    if len(header) != length:
        _refuse(path, f"it shrank while it was read, {length - len(header)} bytes of its header are missing")
    return header


def _parse_header(path: Path, size: int, header: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _refuse(path, f"its header has the key {twice!r} twice")
        return found

    if not header.startswith(b"{"):
        _refuse(path, "its header does not begin with '{'")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError:
        _refuse(path, "its header is not UTF-8")
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({str(error)[:120]})")
    if not isinstance(parsed, dict):
        _refuse(path, "its header is not a JSON object")
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ does not map text to text")
    entries = {name: _parse_entry(path, name, value, 8 + len(header)) for name, value in parsed.items()}
    return metadata, _check_coverage(path, entries, 8 + len(header), size)


def _parse_entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    shown = repr(name[:200])
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(path, f"the tensor name {ascii(name[:200])} is not valid Unicode")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        _refuse(path, f"the entry of tensor {shown} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _refuse(path, f"tensor {shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(path, f"tensor {shown} has the impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"tensor {shown} has the impossible data_offsets {str(offsets)[:80]}")
    if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS // ITEM_BYTES[dtype]:
        _refuse(path, f"tensor {shown} has the shape {str(shape)[:80]}, more than can be addressed")
    start, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if needed != end - start:
        _refuse(path, f"tensor {shown} needs {needed} bytes for {dtype} {shape}, its data_offsets span {end - start}")
    return Entry(dtype, tuple(shape), data_start + start, needed)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value)


def _check_coverage(path: Path, entries: dict[str, Entry], data_start: int, size: int) -> dict[str, Entry]:
    """The tensors must lie one behind the other and fill the file; returns the entries in that order."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    position, previous = data_start, "the header"
    for name, entry in ordered.items():
        if entry.start != position:
            what = "overlaps" if entry.start < position else f"leaves {entry.start - position} unused bytes behind"
            _refuse(path, f"tensor {name[:200]!r} {what} {previous}")
        position, previous = entry.start + entry.nbytes, repr(name[:200])
    if position > size:
        _refuse(path, f"it is truncated, {position - size} bytes of its tensors are missing")
    if position < size:
        _refuse(path, f"it has {size - position} bytes behind its last tensor")
    return ordered
