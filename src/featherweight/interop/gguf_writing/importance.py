"""Importance matrices: the mean square of every input column, which llama.cpp's encoders weight errors by.

Two forms of file: the older one of bare numbers (`imatrix.dat`), and GGUF with a pair of tensors a matrix,
`NAME.in_sum2` and `NAME.counts`. Names are those of GGUF files. Our statistics have the same numbers on the diagonal
of `gram`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from featherweight.errors import RecipeError
from featherweight.interop.gguf_writing.architecture import Placed
from featherweight.methods.calibrate.statistics_file import StatisticsFile, is_statistics

LARGEST_NAME, LARGEST_ROW = 1 << 10, 1 << 24
CHUNK = 512
"""Tokens of a chunk in files that do not say."""


@dataclass(frozen=True)
class Importance:
    """means : mean squares float32 [in] by GGUF name; tokens : that were seen; sources : what text it was, if known"""

    means: dict[str, NDArray[np.float32]]
    tokens: int = 0
    sources: tuple[str, ...] = field(default=())


def read_importance(path: Path, placed: Mapping[str, str] | None = None) -> Importance:
    """An importance matrix of llama.cpp in either form, or a file of `feather calibrate` with `gram`.

    placed : GGUF names by module, for our own statistics

    RecipeError where the file is none.
    """
    if not path.is_file():
        raise RecipeError(f"there is no file {path}: imatrix names one of llama.cpp's or of `feather calibrate`")
    try:
        if is_statistics(path):
            return _of_statistics(path, placed or {})
        with path.open("rb") as stream:
            form = stream.read(4)
        return _read_gguf(path) if form == b"GGUF" else _read_bare(path)
    except RecipeError:
        raise
    except (OSError, ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
        raise RecipeError(f"{path} is no importance matrix: {error}") from None


def from_statistics(statistics: StatisticsFile, placed: Mapping[str, str]) -> Importance:
    """The diagonals of `gram` of a file of statistics, by GGUF names; `placed` gives these by module."""
    means, tokens = {}, 0
    for module, name in placed.items():
        found = statistics.statistics(module)
        if "gram" in found:
            means[name] = found["gram"].diagonal().float().numpy().copy()
            tokens = max(tokens, int(found["tokens"])) if "tokens" in found else tokens
    if not means:
        raise RecipeError(
            f"{statistics.path} has no gram of any layer here: `feather calibrate --needs gram` gathers it"
        )
    return Importance(means, tokens, (statistics.text,) if statistics.text else ())


def _of_statistics(path: Path, placed: Mapping[str, str]) -> Importance:
    with StatisticsFile.open(path) as statistics:
        return from_statistics(statistics, placed)


def _checked(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    means = np.ascontiguousarray(values, np.float32).reshape(-1)
    if not means.size or not np.isfinite(means).all() or bool((means < 0).any()):
        raise ValueError(f"the values of {name[:80]} are no mean squares")
    return means


def _read_bare(path: Path) -> Importance:
    means: dict[str, NDArray[np.float32]] = {}
    calls = 0
    with path.open("rb") as stream:

        def number() -> int:
            return int(struct.unpack("<i", stream.read(4))[0])

        count = number()
        if count < 1:
            raise ValueError(f"it says that it holds {count} matrices")
        for _ in range(count):
            length = number()
            if not 0 < length <= LARGEST_NAME:
                raise ValueError(f"a name of {length} bytes")
            name = stream.read(length).decode("utf-8")
            calls, size = number(), number()
            if not 0 < size <= LARGEST_ROW:
                raise ValueError(f"{name[:80]} has {size} values")
            read = stream.read(4 * size)
            if len(read) != 4 * size:
                raise ValueError(f"it ends within the values of {name[:80]}")
            means[name] = _checked(np.frombuffer(read, "<f4") / max(1, calls), name)
        rest = stream.read()
    sources = (rest[8 : 8 + struct.unpack("<i", rest[4:8])[0]].decode("utf-8", "replace"),) if len(rest) > 8 else ()
    chunks = struct.unpack("<i", rest[:4])[0] if len(rest) >= 4 else calls
    return Importance(means, int(chunks) * CHUNK, sources)


def _read_gguf(path: Path) -> Importance:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    means: dict[str, NDArray[np.float32]] = {}
    tokens = 0
    for key, sums in tensors.items():
        if not key.endswith(".in_sum2"):
            continue
        name = key.removesuffix(".in_sum2")
        counts = tensors.get(f"{name}.counts")
        if counts is None:
            raise ValueError(f"{name[:80]} has sums and no counts")
        seen = np.asarray(counts, np.float32).reshape(-1, 1)
        sums = np.asarray(sums, np.float32).reshape(len(seen), -1)
        means[name] = _checked(np.where(seen > 0, sums / np.maximum(seen, 1), 1.0), name)
        tokens = max(tokens, int(seen.max()))
    if not means:
        raise ValueError("it holds no sums of squares")
    found = reader.get_field("imatrix.datasets")
    sources = tuple(found.contents()) if found is not None else ()
    return Importance(means, tokens, sources)


def write_importance(importance: Importance, path: Path, form: str) -> None:
    """Write a file that llama.cpp's quantiser reads; `form` is "gguf" or "dat"."""
    tokens = max(1, importance.tokens)
    chunks = -(-tokens // CHUNK)
    names = sorted(importance.means)
    if form == "dat":
        with path.open("wb") as stream:
            stream.write(struct.pack("<i", len(names)))
            for name in names:
                values = importance.means[name]
                stream.write(struct.pack("<i", len(name.encode())) + name.encode())
                stream.write(struct.pack("<ii", chunks, len(values)) + (values * chunks).astype("<f4").tobytes())
            source = (importance.sources[0] if importance.sources else "").encode()
            stream.write(struct.pack("<ii", chunks, len(source)) + source)
        return
    writer = gguf.GGUFWriter(path, "imatrix")
    del writer.kv_data[0]["general.architecture"]  # the file is no model
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(importance.sources) or ["featherweight"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name in names:
        writer.add_tensor(f"{name}.in_sum2", (importance.means[name] * np.float32(tokens)).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def names_by_module(placed: list[Placed]) -> dict[str, str]:
    """GGUF names of matrices by our modules."""
    return {one.tensor.module: one.name for one in placed if len(one.tensor.shape) == 2}
