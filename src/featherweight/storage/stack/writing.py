"""Writing stacks, and prefixes of them as ordinary folders: whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherError
from featherweight.storage.checkpoint.accounting import architecture_of
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_layout, module_specs, quantization_config
from featherweight.storage.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from featherweight.storage.checkpoint.writer import Blob, write_safetensors
from featherweight.storage.codes import code_layout, describe_code
from featherweight.storage.run.ownership import MANIFEST, RECORD
from featherweight.storage.stack.stack import ENTRY, Stack, block_names, blocks_in
from featherweight.system.files import PART_SUFFIX, disk_errors, read_object, sha256_of, to_json, write_text
from featherweight.system.locks import FileLock
from featherweight.system.places import cache_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
REPLACED = (MANIFEST, RECORD, "README.md", "config.json")


def write_stack(source: Path, folder: Path, sequence: Sequence[str], entry: dict[str, Any]) -> None:
    """A compressed folder with its blocks in the order of a sequence.

    sequence : module of each block beyond the first ones
    entry : what the manifest says of the stack beside `modules` and `blocks`; with `identity` that of the output
    """
    with Checkpoint.open(source) as checkpoint:
        specs = module_specs(checkpoint.quantization_config or {})
        stacked = [module for module, spec in specs.items() if blocks_in(spec) > 1]
        later = [f"{module}.{name}" for module, name in block_names(specs, sequence)]
        behind = set(later)
        first = [name for name in checkpoint.names if name not in behind]
        begin(folder)
        write_safetensors(folder / FIRST, [_blob(checkpoint, name) for name in first], {})
        write_safetensors(folder / SECOND, [_blob(checkpoint, name) for name in later], {}, in_order=True)
        weight_map = dict.fromkeys(first, FIRST) | dict.fromkeys(later, SECOND)
        index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, to_json(index))
        places = {module: place for place, module in enumerate(stacked)}
        identity = entry.pop("identity")
        manifest = read_object(source / MANIFEST) | {"identity": identity}
        manifest[ENTRY] = {**entry, "modules": stacked, "blocks": [places[module] for module in sequence]}
        _write_rest(checkpoint, folder, manifest, checkpoint.config, _stack_card(checkpoint, len(sequence)))


def cut(stack: Stack, blocks: int, folder: Path) -> None:
    """The first blocks of a stack as an ordinary folder, which every command reads; it is made whole or not at all.

    FeatherError where something is there already; OutputError where it cannot be written.
    """
    if folder.exists():
        raise FeatherError(f"{folder} is there already: choose another name, or move it away")
    part = folder.with_name(folder.name + PART_SUFFIX)
    try:
        begin(part)
        write_safetensors(part / SINGLE_NAME, stack.blobs(blocks), {})
        specs = stack.prefix_specs(blocks)
        before = stack.checkpoint.config
        old = before["quantization_config"]
        config = {**before, "quantization_config": quantization_config(specs, old["recipe"], old.get("biases"))}
        card = f"{_head(stack.checkpoint)}\nThe first {blocks} blocks of a stack of {stack.blocks}.\n"
        _write_rest(stack.checkpoint, part, _cut_manifest(stack, blocks, specs), config, card)
        with disk_errors(folder):
            os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sized_folder(folder: str | Path, size: int | str) -> tuple[Path, int]:
    """The folder in the cache that the longest prefix of a stack within `size` bytes is, made if it is not there; and
    its number of blocks. CheckpointError for what is no stack, FeatherError below the smallest."""
    with Stack.open(folder) as stack:
        blocks = stack.prefix(size)
        digest = sha256_of(f"{stack.folder.resolve()} {stack.checkpoint.identity()}")[:16]
        place = cache_folder() / "sizes" / f"{stack.folder.resolve().name[:40]}-{blocks}-{digest}"
        with FileLock(place.with_name(place.name + ".lock"), make_folder=True) as lock:
            lock.acquire(wait=True)
            if not (place / "config.json").exists():
                cut(stack, blocks, place)
    return place, blocks


def begin(folder: Path) -> None:
    """An empty folder in the place of what an attempt has left."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _blob(checkpoint: Checkpoint, name: str) -> Blob:
    entry = checkpoint.entry(name)
    return Blob(name, entry.dtype, entry.shape, entry.nbytes, lambda: checkpoint.raw_windows(name))


def _cut_manifest(stack: Stack, blocks: int, specs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """That of the stack, with what the layers are in the prefix."""
    levels, layers, names = stack.levels(blocks), [], set[str]()
    for record in stack.manifest.get("layers", []):
        if not isinstance(record, dict) or record.get("name") not in levels:
            layers.append(record)
            continue
        module = record["name"]
        spec, names = specs[module], names | {module}
        nbytes = sum(entry.nbytes for entry in code_layout(spec).values())
        weights = spec["shape"][0] * spec["shape"][1]
        errors = stack.manifest[ENTRY].get("errors", {}).get(module, [])
        error = errors[levels[module] - 1] if len(errors) >= levels[module] else record.get("relative_error")
        changes = {"spec": spec, "nbytes": nbytes, "bits_per_weight": 8 * nbytes / weights, "relative_error": error}
        layers.append({**record, **changes, **({"code": describe_code(spec)} if "code" in record else {})})
    total = sum(blob.nbytes for blob in stack.blobs(blocks))
    kept = {name: value for name, value in stack.manifest.items() if name not in (ENTRY, "files")}
    coded = sum(entry.nbytes for module in specs for entry in module_layout(module, specs[module]).values())
    weights = sum(spec["shape"][0] * spec["shape"][1] for spec in specs.values())
    return {
        **kept,
        "identity": {"stack": stack.checkpoint.identity(), "blocks": blocks},
        "bits_per_weight": 8 * coded / max(1, weights),
        "bits_per_weight_model": 8 * total / max(1, int(stack.manifest.get("parameters") or weights)),
        "bytes": total,
        "layers": layers,
    }


def _write_rest(
    checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any], config: dict[str, Any], card: str
) -> None:
    """What stands beside the weights; config.json last, so that what is half there is never taken for a model."""
    with disk_errors(folder):
        for path in checkpoint.other_files():
            if path.name not in REPLACED:
                shutil.copyfile(path, folder / path.name)
        written = {path.name for path in folder.iterdir()}
    manifest["files"] = sorted(written | {MANIFEST, "README.md", "config.json"})
    write_text(folder / MANIFEST, to_json(manifest))
    write_text(folder / "README.md", card)
    write_text(folder / "config.json", to_json(config))


def _head(checkpoint: Checkpoint) -> str:
    architecture = architecture_of(checkpoint.config) or "A model"
    return f"---\nlibrary_name: transformers\ntags: [featherweight]\n---\n\n# {architecture}, by featherweight\n"


def _stack_card(checkpoint: Checkpoint, blocks: int) -> str:
    return f"""{_head(checkpoint)}
A stack of {blocks} blocks behind the smallest model. `featherweight.load(DIR, size="60MB")` takes as many as fit.
Without a size all of them are loaded.
"""
