"""A healed folder: the shards of the given one with other codes and norms, and files that say so."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.methods.quantize.base import WeightSource
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import Blob, blob_of, write_safetensors
from featherweight.storage.codes import Code
from featherweight.storage.run.card import model_card
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.ownership import MANIFEST, RECORD
from featherweight.storage.run.record import compression_record
from featherweight.system.files import disk_errors, read_object, to_json, write_text
from featherweight.tasks.compress.plain import COPY_WINDOW
from featherweight.tasks.compress.solve import relative_error
from featherweight.version import __version__

INDEX = "model.safetensors.index.json"


def write_healed(
    run: RunFolder,
    small: Checkpoint,
    made: tuple[Mapping[str, Code], Mapping[str, Tensor]],
    weights: Mapping[str, WeightSource],
    identity: dict[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write everything into the run's folder, from where it is published.

    made : codes by layer, and norms by name
    weights : originals of the layers, for their errors
    facts : for the manifest's list `healed`; free of times
    """
    folder = run.assembled
    codes, norms = made
    new = {f"{module}.{name}": tensor for module, code in codes.items() for name, tensor in code.tensors().items()}
    new |= norms
    for file in small.files:
        blobs = [_blob(file, name, new) for name in file.entries]
        write_safetensors(folder / file.path.name, blobs, {})
    before = read_object(small.folder / MANIFEST)
    manifest = {**before, "identity": identity, "featherweight": __version__}
    manifest["healed"] = [*before.get("healed", ()), dict(facts)]
    manifest["layers"] = [_record(record, codes, weights) for record in before.get("layers", ())]
    with disk_errors(folder):
        for path in small.other_files():
            if path.name not in (MANIFEST, RECORD):
                shutil.copyfile(path, folder / path.name)
        if (small.folder / INDEX).is_file():
            shutil.copyfile(small.folder / INDEX, folder / INDEX)
        shutil.copyfile(small.folder / "config.json", folder / "config.json")
    kept = {path.name for path in folder.iterdir()}
    manifest["files"] = sorted(kept | {MANIFEST, RECORD, "README.md"})
    write_text(folder / MANIFEST, to_json(manifest))
    write_text(folder / "README.md", model_card(manifest, small.config))


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """What the run took; it alone has times in it."""
    write_text(folder / RECORD, compression_record(facts))


def _blob(file: SafetensorsFile, name: str, new: Mapping[str, Tensor]) -> Blob:
    entry = file.entry(name)
    if name in new:
        blob = blob_of(name, new[name])
        assert (blob.dtype, blob.shape) == (entry.dtype, entry.shape), name
        return blob
    return Blob(name, entry.dtype, entry.shape, entry.nbytes, partial(file.raw_windows, name, COPY_WINDOW))


def _record(
    record: Mapping[str, Any], codes: Mapping[str, Code], weights: Mapping[str, WeightSource]
) -> dict[str, Any]:
    """What the manifest says of a layer."""
    name = record["name"]
    if name not in codes or name not in weights:
        return dict(record)
    kept = {key: value for key, value in record.items() if key not in ("output_error", "held_out_error", "unchecked")}
    return {**kept, "relative_error": relative_error(weights[name], codes[name])}
