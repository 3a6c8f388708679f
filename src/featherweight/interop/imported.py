"""An imported model as a folder of our format: shards of bounded size, config, manifest, model card."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.interop.imports import Imported, ImportedTensor
from featherweight.storage.checkpoint.accounting import architecture_of
from featherweight.storage.checkpoint.format import FORMAT_VERSION, quantization_config
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from featherweight.storage.checkpoint.writer import Blob, blob_of, write_safetensors
from featherweight.storage.codes import Code
from featherweight.storage.run.ownership import MANIFEST
from featherweight.system.files import disk_errors, to_json, write_text
from featherweight.version import __version__

SHARD_BYTES = 512 << 20  # of which as much is in memory at a time, as one file is written in the order of element sizes

Told = Callable[[int, int], None]


def write_imported(imported: Imported, folder: Path, told: Told | None = None) -> None:
    """Write a model into a folder, which is made if it is not there; shards that are complete in it are kept.

    told : called with the bytes that are done and those of all

    Raises
    ------
    CheckpointError
        A tensor's values are not what its description says.
    OutputError
        The folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(imported.tensors)
    total, done = sum(tensor.nbytes for tensor in imported.tensors), 0
    weight_map: dict[str, str] = {}
    coded = any(tensor.spec is not None for tensor in imported.tensors)
    for number, tensors in enumerate(shards):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        path = folder / name
        if not _complete(path):
            write_safetensors(path, [blob for tensor in tensors for blob in _blobs(tensor)], {}, coded=coded)
        with SafetensorsFile.open(path) as file:
            weight_map |= dict.fromkeys(file.entries, name)
        done += sum(tensor.nbytes for tensor in tensors)
        if told is not None:
            told(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, to_json(index))
    imported.write_beside(folder)
    config = {key: value for key, value in imported.config.items() if key != "quantization_config"}
    if coded:
        specs = {tensor.module: tensor.spec for tensor in imported.tensors if tensor.spec is not None}
        config["quantization_config"] = quantization_config(specs, {"name": "imported", "notes": imported.origin})
    write_text(folder / MANIFEST, to_json(_manifest(imported, total)))
    write_text(folder / "README.md", _card(imported, config, total))
    write_text(folder / "config.json", to_json(config))  # last: what is half there is never taken for a model


def _shards(tensors: tuple[ImportedTensor, ...]) -> list[list[ImportedTensor]]:
    shards: list[list[ImportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _complete(path: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        SafetensorsFile.open(path).close()
        return True
    return False


def _blobs(tensor: ImportedTensor) -> list[Blob]:
    value = tensor.load()
    if isinstance(value, Code):
        if tensor.spec is None or value.spec != tensor.spec:
            raise CheckpointError(f"the importer's code for {tensor.name} is {value.spec}, not {tensor.spec}")
        return [blob_of(f"{tensor.module}.{name}", stored) for name, stored in value.tensors().items()]
    _check(tensor, value)
    return [blob_of(tensor.name, value)]


def _check(tensor: ImportedTensor, value: Tensor) -> None:
    if tensor.spec is not None or tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
        raise CheckpointError(
            f"the importer gave {value.dtype} {list(value.shape)} for {tensor.name}, which it had described as "
            f"{tensor.spec or tensor.dtype} {list(tensor.shape)}"
        )


def _manifest(imported: Imported, total: int) -> dict[str, Any]:
    coded = [tensor for tensor in imported.tensors if tensor.spec is not None]
    return {
        "format_version": FORMAT_VERSION,
        "featherweight": __version__,
        "identity": {"imported": imported.origin},
        "recipe": {"name": "imported", "notes": imported.origin},
        "imported": {"origin": imported.origin, "coded": len(coded), "plain": len(imported.tensors) - len(coded)},
        "notes": list(imported.notes),
        "bytes": total,
        "layers": [],
    }


def _card(imported: Imported, config: dict[str, Any], total: int) -> str:
    architecture = architecture_of(config) or "a model"
    coded = sum(tensor.spec is not None for tensor in imported.tensors)
    return f"""---
library_name: transformers
tags: [featherweight]
---

# {architecture}, read by featherweight

Read from {imported.origin}: {len(imported.tensors)} tensors, {coded} of them as codes that stand for the very values of
the source, {total:,} bytes. Load it after `import featherweight`, as any other folder.
"""
