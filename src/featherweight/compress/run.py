"""A compression in progress: a folder in which every finished layer is an atomic, hashed artifact.

Beside the output OUT stands OUT.feather-run while the work lasts:

    run.json         what is being made: source, recipe and their digest; another command is refused here
    lock             held by the process at work
    artifacts/N.safetensors   layer N, its code's tensors, hashes and error; the name appears when it is complete
    assembly.json    written when all layers are done: which tensors go to which shard, and what is known of the layers
    out/             the output being assembled; renamed to OUT when complete

Whatever moment the process dies at, the same command finds complete artifacts (by hash) and goes on. Nothing in the
output depends on time or on where the work was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featherweight.checkpoint.safetensors_file import SafetensorsFile
from featherweight.checkpoint.writer import blob_of, disk_errors, to_json, write_safetensors, write_text
from featherweight.codes import Code
from featherweight.errors import CheckpointError, OutputError

LAYER_KEY = "featherweight.layer"
RUN_SUFFIX = ".feather-run"


class RunFolder:
    """See the module. `opened()` yields it with the lock held."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + RUN_SUFFIX)
        self.artifacts = self.path / "artifacts"
        self.assembled = self.path / "out"
        self.assembly = self.path / "assembly.json"

    @classmethod
    @contextlib.contextmanager
    def opened(cls, out: Path, identity: dict[str, Any], discard: bool) -> Iterator[RunFolder]:
        """Begin or go on. `identity` says what is made; a run of something else is refused, or discarded if asked."""
        run = cls(out)
        with disk_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
            lock = (run.path / "lock").open("a")
        with lock:
            _lock(lock, run.path)
            found = run._identity()
            if found is not None and found != identity:
                if not discard:
                    raise OutputError(
                        f"an unfinished run of another command is in {run.path} ({_difference(found, identity)}); "
                        "repeat that command to finish it, choose another --out, or discard it with --overwrite"
                    )
                run._clear()
            with disk_errors(run.path):
                run.artifacts.mkdir(exist_ok=True)
                run.assembled.mkdir(exist_ok=True)
            write_text(run.path / "run.json", to_json(identity))
            yield run

    def _identity(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def artifact(self, index: int) -> Path:
        return self.artifacts / f"{index:06d}.safetensors"

    def keep(self, index: int, code: Code, record: dict[str, Any]) -> None:
        """Store a finished layer."""
        blobs = [blob_of(name, tensor) for name, tensor in code.tensors().items()]
        write_safetensors(self.artifact(index), blobs, {LAYER_KEY: json.dumps(record, sort_keys=True)}, sync=False)

    def record(self, index: int, layer: str) -> dict[str, Any] | None:
        """What is known of a finished layer; None if its artifact is missing, damaged or of another layer."""
        path = self.artifact(index)
        if not path.exists():
            return None
        try:
            with SafetensorsFile.open(path) as file:
                found = json.loads(file.metadata[LAYER_KEY])
                if found["name"] == layer and not damaged_tensors(file):
                    return dict(found)
        except (CheckpointError, KeyError, ValueError, TypeError):
            pass
        path.unlink()
        return None

    def read_assembly(self) -> dict[str, Any] | None:
        if not self.assembly.exists():
            return None
        found: dict[str, Any] = json.loads(self.assembly.read_text(encoding="utf-8"))
        return found

    def publish(self) -> None:
        """Put the assembled output in its place, what stood there aside, and remove the run folder."""
        with disk_errors(self.out):
            old = self.path / "replaced"
            if self.out.exists() and any(self.out.iterdir()):
                os.rename(self.out, old)
            try:
                os.replace(self.assembled, self.out)
            except OSError:  # OUT is a mount point: move file by file, config.json last, so that it is never half
                for entry in sorted(self.assembled.iterdir(), key=lambda p: p.name == "config.json"):
                    shutil.move(str(entry), self.out / entry.name)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def damaged_tensors(file: SafetensorsFile) -> list[str]:
    """Names of tensors whose bytes do not have the hash the file states; KeyError if it states none."""
    from featherweight.checkpoint.format import HASHES_KEY

    hashes = json.loads(file.metadata[HASHES_KEY])
    wrong = []
    for name in file.entries:
        digest = hashlib.sha256()
        for window in file.raw_windows(name):
            digest.update(window)
        if digest.hexdigest() != hashes.get(name):
            wrong.append(name)
    return wrong


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    for key in wanted:
        if found.get(key) == wanted[key]:
            continue
        if isinstance(wanted[key], dict) and isinstance(found.get(key), dict):
            return f"{key}: {_difference(found[key], wanted[key])}"
        return f"{key} was {found.get(key)!r}, now {wanted[key]!r}"
    return "it is damaged" if not found else "it holds further settings"


def _lock(stream: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two runs on one output are the caller's to avoid
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"another process is working in {path}; wait for it or choose another --out") from None
