"""The header of one GGUF file, checked in all that it claims before anything is read by it.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): "GGUF", a version, the numbers of tensors and of
pairs of metadata, the pairs, the tensors' names, shapes, types and places, then their bytes, each at a multiple of an
alignment. The parser is our own for the same reasons as that of safetensors: what is wrong is said in a sentence, and
no number of a file that was damaged, or made to do harm, is believed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.types import OTHERS, Q2_0, Q2_0_WIDE, TYPES, BlockType

MAGIC = b"GGUF"
OLD_MAGICS = (b"lmgg", b"tjgg", b"fmgg", b"algg")  # ggml, ggjt, ggmf, ggla as numbers in this order of bytes
VERSIONS = (2, 3)
LONGEST_NAME = 1 << 16
DEEPEST_ARRAY = 4
MOST_DIMENSIONS = 4
MOST_ELEMENTS = 2**63 - 1
LARGEST_ALIGNMENT = 1 << 30
SMALLEST_PAIR, SMALLEST_TENSOR = 13, 32  # bytes: name and value of nothing; name, one dimension, type and place

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""Kinds of values that are numbers, as struct writes them."""
BOOL, STRING, ARRAY = 7, 8, 9
LEAST_BYTES = {kind: struct.calcsize("<" + code) for kind, code in NUMBERS.items()} | {BOOL: 1, STRING: 8, ARRAY: 12}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `shape` as PyTorch has it, rows first; `start` in bytes from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    version : 2 or 3
    metadata : by key; numbers, text, and lists of these (numbers as arrays of numpy)
    tensors : by name, in the order of the file
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, content: memoryview) -> Header:
    """The header of a file whose bytes are `content`. CheckpointError that says what is wrong with it."""
    reader = _Reader(path, content)
    version = _read_version(reader, content)
    tensor_count, pair_count = reader.number("Q", "tensors"), reader.number("Q", "metadata")
    reader.expect(pair_count * SMALLEST_PAIR, f"{pair_count} pairs of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = reader.text("the name of a key", LONGEST_NAME)
        if key in metadata:
            reader.refuse(f"its metadata has the key {shown(key)} twice")
        metadata[key] = reader.value(reader.number("I", f"the key {shown(key)}"), key)
    reader.expect(tensor_count * SMALLEST_TENSOR, f"{tensor_count} tensors")
    alignment = _alignment(reader, metadata)
    entries = [_read_entry(reader, alignment) for _ in range(tensor_count)]
    begin = -(-reader.position // alignment) * alignment
    tensors = _placed(reader, entries, begin, alignment)
    return Header(version, metadata, tensors)


@dataclass(frozen=True)
class _Entry:
    """offset : from the beginning of the data; number : of the type"""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


class _Reader:
    """Reads on from a position; what would go beyond the end is refused by name."""

    def __init__(self, path: Path, content: memoryview) -> None:
        self.path, self.content, self.position = path, content, 0

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is not a valid GGUF file: {reason}")

    def expect(self, count: int, what: str) -> None:
        """Refuse unless so many bytes are left."""
        missing = self.position + count - len(self.content)
        if missing > 0:
            self.refuse(f"it is truncated, {missing} bytes are missing for {what}")

    def take(self, count: int, what: str) -> memoryview:
        self.expect(count, what)
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, code: str, what: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def text(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            self.refuse(f"{what} claims {length} bytes, the limit is {most}")
        raw = self.take(length, what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"the value of {shown(key)}"
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == BOOL:
            return self._bool(bytes(self.take(1, what)), what)
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self._array(key, what, depth)
        self.refuse(f"{what} has the unknown kind {kind}")

    def _array(self, key: str, what: str, depth: int) -> Any:
        if depth == DEEPEST_ARRAY:
            self.refuse(f"{what} has arrays within arrays, deeper than {DEEPEST_ARRAY}")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind not in LEAST_BYTES:
            self.refuse(f"{what} is an array of the unknown kind {kind}")
        self.expect(count * LEAST_BYTES[kind], f"{count} elements of {what[len('the value of ') :]}")
        if kind in NUMBERS:
            raw = self.take(count * LEAST_BYTES[kind], what)
            return np.frombuffer(raw, np.dtype("<" + NUMBERS[kind])).copy()
        if kind == BOOL:
            return self._bools(bytes(self.take(count, what)), what)
        return [self.text(what) if kind == STRING else self._array(key, what, depth + 1) for _ in range(count)]

    def _bool(self, raw: bytes, what: str) -> bool:
        return self._bools(raw, what)[0]

    def _bools(self, raw: bytes, what: str) -> list[bool]:
        if any(byte > 1 for byte in raw):
            self.refuse(f"{what} is neither true nor false")
        return [byte == 1 for byte in raw]


def _read_version(reader: _Reader, content: memoryview) -> int:
    if len(content) == 0:
        reader.refuse("it is empty")
    magic = bytes(content[:4])
    if magic in OLD_MAGICS:
        raise CheckpointError(
            f"{reader.path} is of a format that came before GGUF, which llama.cpp itself no longer reads: convert the "
            "original model again"
        )
    if magic != MAGIC:
        reader.refuse(f"it begins with {shown(magic)}, not with 'GGUF'")
    reader.position = 4
    version: int = reader.number("I", "the version")
    if version in VERSIONS:
        return version
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{reader.path} is a big-endian GGUF file, for other machines than this one: turn it with "
            "gguf-convert-endian of the package gguf"
        )
    known = " and ".join(map(str, VERSIONS))
    hint = "convert the model again" if version < VERSIONS[0] else "install a newer featherweight"
    raise CheckpointError(f"{reader.path} is a GGUF file of version {version}, {known} are read: {hint}")


def _alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or not 1 <= found <= LARGEST_ALIGNMENT or found & (found - 1):
        reader.refuse(f"its alignment is {shown(found)}, expected a power of two")
    return found


def _read_entry(reader: _Reader, alignment: int) -> _Entry:
    name = reader.text("the name of a tensor", LONGEST_NAME)
    about = f"tensor {shown(name)}"
    count = reader.number("I", about)
    if not 1 <= count <= MOST_DIMENSIONS:
        reader.refuse(f"{about} has {count} dimensions, expected 1 to {MOST_DIMENSIONS}")
    sides = struct.unpack(f"<{count}Q", reader.take(8 * count, about))
    number, offset = reader.number("I", about), reader.number("Q", about)
    if not all(sides) or math.prod(sides) > MOST_ELEMENTS:
        reader.refuse(f"{about} has the impossible shape {shown(list(reversed(sides)))}")
    if number not in TYPES:
        why = OTHERS.get(number)
        reason = f"the type {why}" if why else f"the type {number}, which this release does not know"
        raise CheckpointError(f"{reader.path} cannot be read: its tensor {shown(name)} is of {reason}")
    if offset % alignment:
        reader.refuse(f"{about} begins at {offset}, which is no multiple of the alignment {alignment}")
    return _Entry(name, tuple(reversed(sides)), number, offset)


def _placed(reader: _Reader, entries: list[_Entry], begin: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors with their bytes: whole blocks, none over another, all within the file."""
    size = len(reader.content)
    wide = _has_wide_q2_0(entries, size - begin, alignment)
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        if entry.name in tensors:
            reader.refuse(f"it has the tensor {shown(entry.name)} twice")
        kind = Q2_0_WIDE if wide and entry.number == Q2_0.number else TYPES[entry.number]
        if entry.shape[-1] % kind.weights:
            reader.refuse(
                f"tensor {shown(entry.name)} has rows of {entry.shape[-1]}, and blocks of {kind.name} take "
                f"{kind.weights}"
            )
        nbytes = kind.bytes_of(math.prod(entry.shape))
        missing = begin + entry.offset + nbytes - size
        if missing > 0:
            reader.refuse(f"it is truncated, {missing} bytes are missing for tensor {shown(entry.name)}")
        tensors[entry.name] = TensorInfo(entry.name, entry.shape, kind, begin + entry.offset, nbytes)
    last: TensorInfo | None = None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if last is not None and tensor.start < last.start + last.nbytes:
            reader.refuse(f"tensor {shown(tensor.name)} overlaps {shown(last.name)}")
        last = tensor
    return tensors


def _has_wide_q2_0(entries: list[_Entry], size: int, alignment: int) -> bool:
    """Whether all tensors of the number 42 end where the next begins if their blocks are those of 128."""
    starts = sorted({entry.offset for entry in entries} | {max(size, 0)})
    following = dict(zip(starts, starts[1:], strict=False))

    def fits(kind: BlockType, entry: _Entry) -> bool:
        room = following.get(entry.offset, 0) - entry.offset
        return entry.shape[-1] % kind.weights == 0 and 0 <= room - kind.bytes_of(math.prod(entry.shape)) < alignment

    asked = [entry for entry in entries if entry.number == Q2_0.number]
    return bool(asked) and all(fits(Q2_0_WIDE, e) for e in asked) and not all(fits(Q2_0, e) for e in asked)
