"""Checking a folder: headers, names, shapes against the config, and every tensor's bytes against its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import (
    FORMAT_VERSION,
    HASHES_KEY,
    METHOD,
    VERSION_KEY,
    module_layout,
    module_specs,
)
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.codes import UnknownCodeError


@dataclass
class Verification:
    """problems : one sentence each; empty means the folder is whole
    tensors, hashed : how many there are, and how many of them had a hash to compare with
    notes : what is odd but no fault
    modules : compressed modules whose tensors were checked against their spec
    newer : problems that a newer release of featherweight would not have; they are among `problems`
    """

    tensors: int = 0
    hashed: int = 0
    modules: int = 0
    bytes: int = 0
    newer: int = 0
    problems: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.problems


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Check a folder, compressed or not. CheckpointError where it cannot be opened (truncated, bad header)."""
    result = Verification()
    with Checkpoint.open(folder) as checkpoint:
        total = checkpoint.total_bytes
        config = checkpoint.quantization_config
        ours = config is not None and config.get("quant_method") == METHOD
        for file in checkpoint.files:
            _verify_file(file, ours, result, lambda: progress and progress(result.bytes, total))
        if config is not None and ours:
            try:
                specs = module_specs(config)
            except CheckpointError as error:
                result.problems.append(f"config.json: {error}")
                version = config.get("format_version")
                result.newer += isinstance(version, int) and version > FORMAT_VERSION
                specs = {}
            _verify_modules(checkpoint, specs, result)
        _verify_completeness(checkpoint, result)
    return result


def _verify_file(file: SafetensorsFile, ours: bool, result: Verification, told: Callable[[], object]) -> None:
    try:
        hashes: dict[str, Any] = json.loads(file.metadata.get(HASHES_KEY, "{}"))
        assert isinstance(hashes, dict)
    except (ValueError, AssertionError):
        result.problems.append(f"{file.path}: the table of hashes in its header cannot be read")
        hashes = {}
    if not ours and VERSION_KEY in file.metadata:
        result.problems.append(
            f"{file.path}: it was compressed with featherweight, of which config.json says nothing: restore that file"
        )
    if ours and not hashes:
        result.problems.append(f"{file.path}: the table of hashes in its header is missing")
    known = {str(version) for version in range(1, FORMAT_VERSION + 1)}
    if ours and (file.metadata.get(VERSION_KEY) not in known or file.metadata.get("format") != "pt"):
        result.problems.append(f"{file.path}: the format in its header is not one that this release writes")
    for name in hashes.keys() - file.entries.keys():
        result.problems.append(f"{file.path}: tensor {name} has a hash but is missing")
    for name, entry in file.entries.items():
        result.tensors += 1
        result.bytes += entry.nbytes
        if name in hashes:
            digest = hashlib.sha256()
            for window in file.raw_windows(name):
                digest.update(window)
            result.hashed += 1
            if digest.hexdigest() != hashes[name]:
                result.problems.append(f"{file.path}: the bytes of tensor {name} do not match their hash")
        elif hashes:
            result.problems.append(f"{file.path}: tensor {name} has no hash while others have")
        told()


def _verify_completeness(checkpoint: Checkpoint, result: Verification) -> None:
    """Whether the tensors are those of the model that config.json describes."""
    from featherweight.model.network.accounting import check_complete, check_compressed

    config = checkpoint.quantization_config
    ours = config is not None and config.get("quant_method") == METHOD
    try:
        if config is None or not (ours or checkpoint.has_codes):  # where a method is named in vain, the model's own
            result.notes += check_complete(checkpoint).notes
        elif ours and not result.problems:
            result.notes += check_compressed(checkpoint)
    except CheckpointError as error:
        result.problems.append(str(error))


def _verify_modules(checkpoint: Checkpoint, specs: dict[str, dict[str, Any]], result: Verification) -> None:
    unknown: dict[str, list[str]] = {}
    for module, spec in specs.items():
        result.modules += 1
        try:
            layout = module_layout(module, spec)
        except UnknownCodeError as error:
            unknown.setdefault(str(spec["kind"]), []).append(str(error))
            continue
        except CheckpointError as error:  # the others are checked all the same
            result.problems.append(str(error))
            continue
        for name, (shape, dtype) in layout.items():
            full = f"{module}.{name}"
            try:
                entry = checkpoint.entry(full)
            except CheckpointError:
                result.problems.append(f"tensor {full} is missing")
                continue
            if tuple(entry.shape) != tuple(shape) or entry.torch_dtype != dtype:
                result.problems.append(
                    f"tensor {full} is {entry.dtype} {list(entry.shape)}, its code needs {dtype} {list(shape)}"
                )
    for sentences in unknown.values():
        more = f" (and those of {len(sentences) - 1} further modules)" if len(sentences) > 1 else ""
        result.problems.append(sentences[0] + more)
        result.newer += 1
