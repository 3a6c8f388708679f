"""Where imported models are kept, so that the same file is read once: FEATHERWEIGHT_CACHE, else the user's cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from featherweight.errors import OutputError
from featherweight.events import steps
from featherweight.interop.imported import Told, write_imported
from featherweight.interop.imports import Imported, Importer
from featherweight.system.files import PART_SUFFIX, disk_errors
from featherweight.system.locks import FileLock
from featherweight.system.places import cache_folder
from featherweight.system.units import size_text

HEAD_BYTES = 1 << 20
MEGABYTE = 1_000_000


def cached(importer: type[Importer], path: Path) -> Path:
    """The folder that a file or folder of another tool is in the cache; it is made if it is not there.

    Its name has a digest of the source's place, sizes, times and first bytes, and of the importer's revision, so
    that a source that was changed is read again. Killed while it is made, the same call goes on.

    Raises
    ------
    CheckpointError
        The source cannot be read.
    OutputError
        The cache cannot be written, or its disk has no room.
    """
    stem = re.sub(r"[^\w.-]+", "-", path.stem if path.is_file() else path.name)[:60] or "model"
    folder = cache_folder() / "imported" / f"{stem}-{_digest(importer, path)}"
    if (folder / "config.json").exists():
        return folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(folder.name + PART_SUFFIX)
    with FileLock(part.with_name(part.name + ".lock")) as lock:
        lock.acquire(wait=True)
        if not (folder / "config.json").exists():  # another process may have made it meanwhile
            imported = importer.open(path)
            try:
                check_room(imported, part, "set FEATHERWEIGHT_CACHE to a folder on another disk")
                with steps(f"reading {path.name} ({imported.origin}), MB") as told:
                    write_imported(imported, part, _in_megabytes(told))
            finally:
                imported.close()
            with disk_errors(folder):
                os.rename(part, folder)
    return folder


def _in_megabytes(told: Told) -> Told:
    return lambda done, total: told(done // MEGABYTE, total // MEGABYTE)


def _digest(importer: type[Importer], path: Path) -> str:
    digest = hashlib.sha256(f"{importer.kind} {importer.revision}\n".encode())
    for file in importer.files(path):
        about = file.stat()
        digest.update(f"{file.resolve()}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(HEAD_BYTES))
    return digest.hexdigest()[:16]


def check_room(imported: Imported, part: Path, remedy: str) -> None:
    """OutputError before anything is written, where the disk is too small. remedy : what to do beside making room"""
    needed = sum(tensor.nbytes for tensor in imported.tensors)
    there = sum(file.stat().st_size for file in part.glob("*")) if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if needed - there > free:
        raise OutputError(
            f"reading this model takes {size_text(needed)} in {part.parent}, where {size_text(free)} are free: free "
            f"some, or {remedy}"
        )
