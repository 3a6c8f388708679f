"""From artifacts to the finished Hugging Face folder: shards, index, config, manifest, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy import config_ties
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import FORMAT_VERSION, quantization_config
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import Blob, disk_errors, to_json, write_safetensors, write_text
from featherweight.storage.run.card import model_card
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.ownership import MANIFEST
from featherweight.tasks.compress.plan import COPY_WINDOW, Plan
from featherweight.version import __version__


def lay_out(
    plan: Plan,
    checkpoint: Checkpoint,
    records: list[dict[str, Any]],
    shard_bytes: int,
    changed: dict[str, Path] | None = None,
    config: dict[str, Any] | None = None,
    whole_model: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Which tensors go to which shard. Source order; a layer's tensors stay together.

    changed : plain tensors that calibration changed or added, and the files that hold them
    config : entries of config.json that must change with them
    whole_model : what steps that changed the whole model did on held-out windows
    """
    changed = changed or {}
    jobs_of: dict[str, list[int]] = {}
    for index, job in enumerate(plan.jobs):
        jobs_of.setdefault(job.layer.tensor, []).append(index)
    shards: list[list[dict[str, Any]]] = [[]]
    size = 0
    names = [name for name in checkpoint.names if name not in plan.dropped]
    added = [name for name in changed if name not in names]
    for name in [*names, *added]:
        if name in jobs_of:
            entries: list[tuple[dict[str, Any], int]] = [
                ({"job": index}, records[index]["nbytes"]) for index in jobs_of[name]
            ]
        elif name in changed:
            entries = [({"changed": name, "file": changed[name].name}, _nbytes(changed[name], name))]
        else:
            entries = [({"copy": name}, checkpoint.entry(name).nbytes)]
        for entry, nbytes in entries:
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += nbytes
    return {
        "layers": records,
        "config": config or {},
        "whole_model": whole_model or [],
        "changed": sorted(changed),
        "added_bytes": sum(_nbytes(changed[name], name) for name in _of_codes(added, records)),
        "shards": [{"file": _shard_name(i, len(shards)), "entries": s} for i, s in enumerate(shards)],
    }


def _of_codes(added: Iterable[str], records: list[dict[str, Any]]) -> list[str]:
    """Those of the tensors that calibration added that are biases of compressed layers."""
    layers = {f"{record['name']}.bias" for record in records}
    return [name for name in added if name in layers]


def _nbytes(path: Path, name: str) -> int:
    with SafetensorsFile.open(path) as file:
        return file.entry(name).nbytes


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    run: RunFolder, assembly: dict[str, Any], checkpoint: Checkpoint, told: Callable[[str, int, int], None]
) -> None:
    """Write every shard that is not there yet; artifacts go as soon as their shard is complete."""
    shards = assembly["shards"]
    for number, shard in enumerate(shards):
        path = run.assembled / shard["file"]
        if not _complete(path):
            blobs = [b for entry in shard["entries"] for b in _blobs(run, entry, assembly["layers"], checkpoint)]
            write_safetensors(path, blobs, {})
        for entry in shard["entries"]:
            if "job" in entry:
                run.discard(entry["job"])
        told(shard["file"], number + 1, len(shards))


def jobs_to_write(run: RunFolder, assembly: dict[str, Any]) -> list[int]:
    """Jobs whose shard is not there yet, so that their artifacts are still needed."""
    shards = [shard for shard in assembly["shards"] if not _complete(run.assembled / shard["file"])]
    return [entry["job"] for shard in shards for entry in shard["entries"] if "job" in entry]


def _complete(path: Path) -> bool:
    """Shards appear under their name only when all bytes are on disk; the header is checked all the same."""
    try:
        SafetensorsFile.open(path).close()
    except CheckpointError:
        return False
    return True


def _blobs(run: RunFolder, entry: dict[str, Any], records: list[dict[str, Any]], checkpoint: Checkpoint) -> list[Blob]:
    if "copy" in entry:
        return [_copied(checkpoint, entry["copy"])]
    if "changed" in entry:
        path, name = run.changes / entry["file"], entry["changed"]
        with SafetensorsFile.open(path) as file:
            e = file.entry(name)
            return [Blob(name, e.dtype, e.shape, e.nbytes, partial(_artifact_windows, path, name))]
    module, path = records[entry["job"]]["name"], run.artifact(entry["job"])
    with SafetensorsFile.open(path) as artifact:
        return [
            Blob(f"{module}.{name}", e.dtype, e.shape, e.nbytes, partial(_artifact_windows, path, name))
            for name, e in artifact.entries.items()
        ]


def _artifact_windows(path: Path, name: str) -> Iterator[memoryview]:
    """An artifact is open only while it is copied: a shard may hold more of them than a process may have files open."""
    with SafetensorsFile.open(path) as artifact:
        yield from artifact.raw_windows(name, COPY_WINDOW)


def _copied(checkpoint: Checkpoint, name: str) -> Blob:
    """A tensor of the source, read in windows so that its pages do not stay resident."""
    entry = checkpoint.entry(name)
    return Blob(name, entry.dtype, entry.shape, entry.nbytes, lambda: checkpoint.raw_windows(name, COPY_WINDOW))


def write_rest(
    run: RunFolder, assembly: dict[str, Any], checkpoint: Checkpoint, plan: Plan, identity: dict[str, Any]
) -> None:
    """Index, config, manifest, model card and whatever stood beside the source's weights."""
    folder, records = run.assembled, assembly["layers"]
    weight_map: dict[str, str] = {}
    total = 0
    for shard in assembly["shards"]:
        with SafetensorsFile.open(folder / shard["file"]) as file:
            weight_map |= dict.fromkeys(file.entries, shard["file"])
            total += sum(entry.nbytes for entry in file.entries.values())
    if len(assembly["shards"]) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / "model.safetensors.index.json", to_json(index))
    specs = {record["name"]: record["spec"] for record in records}
    kept = set(checkpoint.names) - plan.dropped.keys()
    added = [name for name in assembly.get("changed", []) if name not in kept]
    for name in _of_codes(added, records):
        layer = name.removesuffix(".bias")
        specs[layer] = {**specs[layer], "bias": True}
    given = [name.removesuffix(".bias") for name in added if name.endswith(".bias")]
    recipe = plan.recipe.dump()
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"} | assembly.get("config", {})
    if plan.anatomy.head is not None and config_ties(checkpoint):  # its own head counts, for every reader
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(specs, recipe, [name for name in given if name not in specs])
    manifest = manifest_of(plan, records, identity, total, assembly.get("changed", []), assembly.get("added_bytes", 0))
    if assembly.get("whole_model"):
        manifest["whole_model"] = assembly["whole_model"]
    with disk_errors(folder):
        for path in checkpoint.other_files():
            shutil.copyfile(path, folder / path.name)
        written = {path.name for path in folder.iterdir() if not path.name.endswith(".part")}
    manifest["files"] = sorted(written | {MANIFEST, "README.md", "config.json"})  # what --overwrite may replace
    write_text(folder / MANIFEST, to_json(manifest))
    write_text(folder / "README.md", model_card(manifest, config))
    write_text(folder / "config.json", to_json(config))


def manifest_of(
    plan: Plan,
    records: list[dict[str, Any]],
    identity: dict[str, Any],
    total_bytes: int,
    changed: list[str],
    added_bytes: int,
) -> dict[str, Any]:
    """What was done, tensor by tensor; free of times and paths, so that equal work gives equal bytes."""
    code_bytes = sum(record["nbytes"] for record in records) + added_bytes
    in_blocks = sum(record["nbytes"] for record in records if record["block"] is not None) + added_bytes  # not the head
    return {
        "format_version": FORMAT_VERSION,
        "featherweight": __version__,
        "identity": identity,
        "recipe": plan.recipe.dump(),
        "family": plan.anatomy.family,
        "parameters": plan.parameters,
        "weights": plan.weights,
        "linear_weights": plan.linear_weights,
        "bits_per_weight": 8 * code_bytes / max(1, plan.weights),
        "bits_per_weight_linear": 8 * (in_blocks + plan.linear_dense_bytes) / max(1, plan.linear_weights),
        "bits_per_weight_model": 8 * total_bytes / max(1, plan.parameters),
        "bytes": total_bytes,
        "tensors": {
            "source": len(plan.copied) + len(plan.replaced) + len(plan.dropped),
            "replaced": len(plan.replaced),
            "copied": len(plan.copied),
            "dropped": plan.dropped,
            **({"changed": changed} if changed else {}),
        },
        "layers": records,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished output; None if the folder is not one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "identity" in found and (folder / "config.json").exists() else None
