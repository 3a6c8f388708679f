"""A model as a folder of safetensors for other programs: shards, index, config, and what belongs beside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.interop.exports import Told, Verdict
from featherweight.interop.stored import StoredModel, StoredTensor
from featherweight.storage.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from featherweight.storage.checkpoint.size import OriginalView
from featherweight.storage.checkpoint.writer import DTYPE_CODES, Blob, write_safetensors
from featherweight.system.files import disk_errors, to_json, write_text

SHARD_BYTES = 4 << 30
NO_BIAS = "the compression gave it a bias, for which the model's class has no place"
STACKED = "it is one of several experts that the model's class keeps in one tensor"


@dataclass(frozen=True)
class Part:
    """One tensor of the folder to be written.

    chunks : its values, first dimension after first dimension, made when they are asked for
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def _bytes(chunk: Tensor) -> memoryview:
    raw = chunk.detach().contiguous()
    view: memoryview = raw.reshape(-1).view(torch.uint8).numpy().data if raw.numel() else memoryview(b"")
    return view


class Rounding:
    """Sums for |W' - W| / |W| of one tensor while it is written."""

    def __init__(self) -> None:
        self.missed = self.whole = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        self.missed += float(torch.linalg.vector_norm(after.float() - before, dtype=torch.float64)) ** 2
        self.whole += float(torch.linalg.vector_norm(before, dtype=torch.float64)) ** 2

    @property
    def error(self) -> float:
        return float((self.missed / self.whole) ** 0.5) if self.whole else 0.0


def plain_part(tensor: StoredTensor, dtype: torch.dtype, rounding: Rounding, transposed: bool = False) -> Part:
    """A tensor's values in `dtype`; of a code they are decoded some rows at a time."""

    def chunks() -> Iterator[Tensor]:
        if tensor.spec is None and dtype == tensor.dtype:
            yield tensor.values()
            return
        kept = []
        for _, _, rows in tensor.windows():
            stored = rows.to(dtype)
            rounding.add(rows, stored)
            if transposed:
                kept.append(stored)
            else:
                yield stored
        if transposed:
            yield torch.cat(kept).T

    shape = tensor.shape[::-1] if transposed else tensor.shape
    return Part(tensor.name, dtype, tuple(shape), chunks)


@dataclass(frozen=True)
class Places:
    """What the tensors of a model are, as far as a writer asks.

    outside : names of token embedding and output layer
    transposed : names that the model's class keeps as [in, out]
    linear : names of matrices of linear layers in blocks
    """

    outside: frozenset[str]
    transposed: frozenset[str]
    linear: frozenset[str]


def places_of(model: StoredModel) -> Places:
    """See `Places`; where a structure is not understood, coded matrices are linear layers."""
    anatomy = OriginalView(model.checkpoint).anatomy()
    if anatomy is None:
        coded = (name for name, tensor in model.tensors.items() if tensor.spec is not None)
        return Places(frozenset(), frozenset(), frozenset(coded))
    head = {anatomy.head.tensor} if anatomy.head else set()
    ties = {f"{name}.weight" for name, _ in anatomy.tied}
    layers = (*anatomy.layers, *anatomy.outside)
    return Places(
        frozenset({*anatomy.embeddings, *head, *ties}),
        frozenset(layer.tensor for layer in layers if layer.transposed),
        frozenset(layer.tensor for layer in anatomy.layers),
    )


def given_bias(model: StoredModel) -> frozenset[str]:
    """Names of weights whose layer has got a bias that its class lacks."""
    config = model.checkpoint.quantization_config or {}
    own = {name for name, tensor in model.tensors.items() if tensor.spec is not None and tensor.spec.get("bias")}
    return frozenset(own | {f"{module}.weight" for module in config.get("biases") or ()})


def with_error(verdict: Verdict, rounding: Rounding | None) -> Verdict:
    """The verdict after writing: what changed nothing is exact."""
    if verdict.fate != "rounded" or rounding is None:
        return verdict if verdict.fate == "impossible" else replace(verdict, error=0.0)
    if rounding.error == 0:
        return replace(verdict, fate="exact", error=0.0)
    return replace(verdict, error=rounding.error)


def write_folder(model: StoredModel, out: Path, parts: Iterable[tuple[int, list[Part]]], told: Told) -> None:
    """Weights in shards, and what belongs beside them but for config.json.

    parts : of each tensor of the model the bytes of its values, for `told`, and what is written for it
    """
    listed = list(parts)
    counted = _Counter(told, sum(size for size, _ in listed))
    shards: list[list[tuple[int, list[Part]]]] = [[]]
    held = 0
    for size, some in listed:
        needed = sum(part.nbytes for part in some)
        if shards[-1] and held + needed > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((size, some))
        held += needed
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        blobs = [counted.blob(part, size if part is some[0] else 0) for size, some in entries for part in some]
        write_safetensors(out / name, blobs, {}, coded=False)
        weight_map |= dict.fromkeys((blob.name for blob in blobs), name)
    if len(shards) > 1:
        stored = sum(part.nbytes for _, some in listed for part in some)
        index = {"metadata": {"total_size": stored}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(out / INDEX_NAME, to_json(index))
    with disk_errors(out):
        for file in model.checkpoint.other_files():
            if not file.name.startswith("featherweight"):
                shutil.copyfile(file, out / file.name)


class _Counter:
    """Tells what is done as tensors pass by."""

    def __init__(self, told: Told, total: int) -> None:
        self.told, self.total, self.done = told, total, 0

    def blob(self, part: Part, size: int) -> Blob:
        def chunks() -> Iterator[memoryview]:
            yield from map(_bytes, part.chunks())
            self.done += size
            if size:
                self.told(self.done, self.total)

        return Blob(part.name, DTYPE_CODES[part.dtype], part.shape, part.nbytes, chunks)


def write_config(model: StoredModel, out: Path, changes: dict[str, Any]) -> None:
    """config.json, last: the model's own, amended."""
    write_text(out / "config.json", to_json(model.config | changes))
