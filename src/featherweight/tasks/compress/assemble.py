"""From artifacts to the finished Hugging Face folder: shards, index, config, manifest, model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy import config_ties
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import FORMAT_VERSION, quantization_config
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import Blob, write_safetensors
from featherweight.storage.run.card import model_card, plain_card
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.ownership import MANIFEST, RECORD
from featherweight.storage.run.store import Store
from featherweight.system.files import PART_SUFFIX, disk_errors, read_object, to_json, write_text
from featherweight.tasks.compress.earlier import earlier_loss, earlier_text, kept_codes, most_error
from featherweight.tasks.compress.fates import counts_in, counts_text
from featherweight.tasks.compress.plain import COPY_WINDOW, is_plain, plain_blob, with_true_dtype
from featherweight.tasks.compress.plan import Plan
from featherweight.version import __version__


def lay_out(
    plan: Plan,
    checkpoint: Checkpoint,
    records: list[dict[str, Any]],
    shard_bytes: int,
    store: Store,
    *,
    changed: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    whole_model: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Which tensors go to which shard. Source order; a layer's tensors stay together.

    store : holds what `changed` names
    changed : plain tensors that calibration changed or added, and the keys of the artifacts that hold them
    config : entries of config.json that must change with them
    whole_model : what steps that changed the whole model did on held-out windows
    """
    changed = changed or {}
    sizes = {name: _nbytes(store, key, name) for name, key in changed.items()}
    jobs_of: dict[str, list[int]] = {}
    for index, job in enumerate(plan.jobs):
        jobs_of.setdefault(job.layer.tensor, []).append(index)
    shards: list[list[dict[str, Any]]] = [[]]
    entries: list[tuple[dict[str, Any], int]]
    size = 0
    names = [name for name in checkpoint.names if name not in plan.dropped]
    added = [name for name in changed if name not in names]
    plain = not plan.keeps_codes and is_plain(records, [job.layer for job in plan.jobs], added)
    for name in [*names, *added]:
        if name in jobs_of and plain:
            size_of_all = sum(records[index]["nbytes"] for index in jobs_of[name])
            entries = [({"plain": name, "jobs": jobs_of[name]}, size_of_all)]
        elif name in jobs_of:
            entries = [({"job": index}, records[index]["nbytes"]) for index in jobs_of[name]]
        elif name in changed:
            entries = [({"changed": name, "key": changed[name]}, sizes[name])]
        else:
            entries = [({"copy": name}, checkpoint.stored_bytes(name))]
        for entry, nbytes in entries:
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += nbytes
    return {
        "layers": records,
        "plain": plain,
        "config": config or {},
        "whole_model": whole_model or [],
        "changed": sorted(changed),
        "added_bytes": sum(sizes[name] for name in _of_codes(added, records)),
        "shards": [{"file": _shard_name(i, len(shards)), "entries": s} for i, s in enumerate(shards)],
    }


def _of_codes(added: Iterable[str], records: list[dict[str, Any]]) -> list[str]:
    """Those of the tensors that calibration added that are biases of compressed layers."""
    layers = {f"{record['name']}.bias" for record in records}
    return [name for name in added if name in layers]


def _nbytes(store: Store, key: str, name: str) -> int:
    with store.open(key) as file:
        return file.entry(name).nbytes


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    run: RunFolder,
    assembly: dict[str, Any],
    checkpoint: Checkpoint,
    plan: Plan,
    told: Callable[[str, int, int], None],
) -> None:
    """Write every shard that is not there yet; artifacts go as soon as their shard is complete."""
    shards = assembly["shards"]
    for number, shard in enumerate(shards):
        path = run.assembled / shard["file"]
        if not _complete(path):
            blobs = [b for entry in shard["entries"] for b in _blobs(run, entry, assembly["layers"], checkpoint, plan)]
            write_safetensors(path, blobs, {}, coded=not assembly.get("plain"))
        for entry in shard["entries"]:
            for index in _jobs_of(entry):
                run.discard(index)
        told(shard["file"], number + 1, len(shards))


def jobs_to_write(run: RunFolder, assembly: dict[str, Any]) -> list[int]:
    """Jobs whose shard is not there yet, so that their artifacts are still needed."""
    shards = [shard for shard in assembly["shards"] if not _complete(run.assembled / shard["file"])]
    return [index for shard in shards for entry in shard["entries"] for index in _jobs_of(entry)]


def _jobs_of(entry: dict[str, Any]) -> list[int]:
    """The jobs whose artifacts an entry of a shard is made of."""
    return [entry["job"]] if "job" in entry else list(entry.get("jobs", ()))


def _complete(path: Path) -> bool:
    """Shards appear under their name only when all bytes are on disk; the header is checked all the same."""
    try:
        SafetensorsFile.open(path).close()
    except CheckpointError:
        return False
    return True


def _blobs(
    run: RunFolder, entry: dict[str, Any], records: list[dict[str, Any]], checkpoint: Checkpoint, plan: Plan
) -> list[Blob]:
    if "copy" in entry:
        return _copied(checkpoint, entry["copy"])
    if "plain" in entry:
        parts = [(plan.jobs[index].layer, run.latest(index)) for index in entry["jobs"]]
        return [plain_blob(run.store, checkpoint.entry(entry["plain"]).shape, parts)]
    if "changed" in entry:
        key, name = entry["key"], entry["changed"]
        with run.store.open(key) as file:
            e = file.entry(name)
            return [Blob(name, e.dtype, e.shape, e.nbytes, partial(_artifact_windows, run.store, key, name))]
    module, key = records[entry["job"]]["name"], run.latest(entry["job"])
    with run.store.open(key) as artifact:
        return [
            Blob(f"{module}.{name}", e.dtype, e.shape, e.nbytes, partial(_artifact_windows, run.store, key, name))
            for name, e in artifact.entries.items()
        ]


def _artifact_windows(store: Store, key: str, name: str) -> Iterator[memoryview]:
    """An artifact is open only while it is copied: a shard may hold more of them than a process may have files open."""
    with store.open(key) as artifact:
        yield from artifact.raw_windows(name, COPY_WINDOW)


def _copied(checkpoint: Checkpoint, name: str) -> list[Blob]:
    """A tensor of the source, or the codes that it is there, read in windows so that their pages do not stay
    resident."""
    source, names = checkpoint.stored_as(name)
    blobs = []
    for stored in names:
        entry = source.entry(stored)
        chunks = partial(source.raw_windows, stored, COPY_WINDOW)
        blobs.append(Blob(stored, entry.dtype, entry.shape, entry.nbytes, chunks))
    return blobs


def write_rest(
    run: RunFolder, assembly: dict[str, Any], checkpoint: Checkpoint, plan: Plan, identity: dict[str, Any], made: str
) -> None:
    """Index, config, manifest, model card and whatever stood beside the source's weights; `made`: the record."""
    folder = run.assembled
    weight_map: dict[str, str] = {}
    total = 0
    dtypes: set[torch.dtype] = set()
    for shard in assembly["shards"]:
        with SafetensorsFile.open(folder / shard["file"]) as file:
            weight_map |= dict.fromkeys(file.entries, shard["file"])
            total += sum(entry.nbytes for entry in file.entries.values())
            dtypes |= {entry.torch_dtype for entry in file.entries.values()}
    config = _config_of(assembly, checkpoint, plan)
    if assembly.get("plain"):
        config = with_true_dtype(config, dtypes)
    if len(assembly["shards"]) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / "model.safetensors.index.json", to_json(index))
    manifest = manifest_of(plan, assembly, identity, total)
    if (earlier := earlier_loss(checkpoint)) is not None:
        manifest["source"] = earlier
    with disk_errors(folder):
        for path in checkpoint.other_files():
            if path.name not in (MANIFEST, RECORD):  # the source is an output of ours itself
                shutil.copyfile(path, folder / path.name)
        written = {path.name for path in folder.iterdir() if not path.name.endswith(PART_SUFFIX)}
    manifest["files"] = sorted(written | {MANIFEST, RECORD, "README.md", "config.json"})  # what --overwrite may replace
    write_text(folder / MANIFEST, to_json(manifest))
    write_text(folder / RECORD, made)
    before = (earlier_text(manifest), most_error(manifest))
    if assembly.get("plain"):
        card = plain_card(manifest, config, counts_text(counts_in(manifest["tensors"], checkpoint.has)), before)
    else:
        card = model_card(manifest, config, before)
    write_text(folder / "README.md", card)
    write_text(folder / "config.json", to_json(config))


def _config_of(assembly: dict[str, Any], checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """config.json of the output."""
    kept_of_source = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    config: dict[str, Any] = kept_of_source | assembly.get("config", {})
    if plan.anatomy.head is not None and config_ties(checkpoint):  # its own head counts, for every reader
        config["tie_word_embeddings"] = False
    if assembly.get("plain"):
        return config
    records = assembly["layers"]
    copied = [entry["copy"] for shard in assembly["shards"] for entry in shard["entries"] if "copy" in entry]
    specs = {record["name"]: record["spec"] for record in records} | kept_codes(copied, checkpoint)
    before = {f"{module}.bias" for module in checkpoint.given_biases} - plan.dropped.keys()
    kept = set(checkpoint.names) - plan.dropped.keys() - before
    added = sorted({name for name in assembly.get("changed", []) if name not in kept} | before)
    for name in _of_codes(added, records):
        layer = name.removesuffix(".bias")
        specs[layer] = {**specs[layer], "bias": True}
    given = [name.removesuffix(".bias") for name in added if name.endswith(".bias")]
    biases = [name for name in given if name not in specs]
    config["quantization_config"] = quantization_config(specs, plan.recipe.dump(), biases)
    return config


def manifest_of(plan: Plan, assembly: dict[str, Any], identity: dict[str, Any], total_bytes: int) -> dict[str, Any]:
    """What was done, tensor by tensor; free of times and paths, so that equal work gives equal bytes."""
    records, added_bytes = assembly["layers"], assembly.get("added_bytes", 0)
    code_bytes = sum(record["nbytes"] for record in records) + added_bytes
    outside = [job.layer for job in plan.outside]
    names, sizes = {layer.name for layer in outside}, {r["name"]: r["nbytes"] for r in records}
    in_blocks = sum(size for name, size in sizes.items() if name not in names) + added_bytes
    outside_bytes = sum(sizes[name] for name in names)
    outside_weights = sum(layer.parameters for layer in outside)
    inside = in_blocks if outside_weights < plan.weights else code_bytes
    manifest = {
        "format_version": FORMAT_VERSION,
        "featherweight": __version__,
        "identity": identity,
        "recipe": plan.recipe.dump(),
        "family": plan.anatomy.family,
        "parameters": plan.parameters,
        "weights": plan.weights,
        "linear_weights": plan.linear_weights,
        "bits_per_weight": 8 * inside / max(1, plan.weights - outside_weights or plan.weights),
        "bits_per_weight_linear": 8 * (in_blocks + plan.linear_dense_bytes) / max(1, plan.linear_weights),
        "bits_per_weight_model": 8 * total_bytes / max(1, plan.parameters),
        "bytes": total_bytes,
        "tensors": _fates_in(plan, assembly),
        "layers": records,
    }
    if outside:
        manifest["bits_per_weight_outside"] = 8 * outside_bytes / outside_weights
    if assembly.get("whole_model"):
        manifest["whole_model"] = assembly["whole_model"]
    return manifest


def _fates_in(plan: Plan, assembly: dict[str, Any]) -> dict[str, Any]:
    """What became of the source's tensors, as the manifest has it; `copied` counts changed and renamed ones, too."""
    plain = bool(assembly.get("plain"))
    changed = [*assembly.get("changed", []), *(plan.replaced if plain else ())]
    replaced = () if plain else plan.replaced
    renamed = {name: plan.renamed[name] for name in plan.copied if name in plan.renamed}
    return {
        "source": len(plan.copied) + len(plan.replaced) + len(plan.dropped),
        "replaced": len(replaced),
        "copied": len(plan.copied) + len(plan.replaced) - len(replaced),
        "dropped": plan.dropped,
        **({"changed": sorted(changed) if plain else changed} if changed else {}),
        **({"renamed": renamed} if renamed else {}),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished output; None if the folder is not one."""
    found = read_object(folder / MANIFEST)
    return found if "identity" in found and (folder / "config.json").exists() else None
