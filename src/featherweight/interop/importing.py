"""`import_model`: a file or folder of another tool as a folder of one's own, not in the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import CheckpointError, OutputError
from featherweight.interop.cache import check_room
from featherweight.interop.exporting import check_place, remove
from featherweight.interop.imported import Told, write_imported
from featherweight.interop.imports import Imported
from featherweight.registry import registered
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.decoded import is_coded
from featherweight.storage.checkpoint.resolve import find_importer, located, resolve
from featherweight.system.files import PART_SUFFIX, disk_errors
from featherweight.system.locks import FileLock


@dataclass(frozen=True)
class ImportedModel:
    """What was made.

    out : the folder
    origin : what the source is, "GGUF, Q4_1, llama"
    coded : tensors that are codes, standing for the very values of the source
    plain : tensors of plain values
    bytes : of all tensors
    notes : what is odd about the source, a sentence each
    """

    out: Path
    origin: str
    coded: int
    plain: int
    bytes: int
    notes: tuple[str, ...] = ()


def import_model(model: str | Path, out: str | Path, *, told: Told | None = None) -> ImportedModel:
    """Write another tool's model as a folder that every command and `featherweight.load` read.

    Values are those of the source, bit for bit: codes where one of ours stands for them, else plain numbers. The
    folder appears under its name when it is complete; what ends the work before leaves nothing.

    Parameters
    ----------
    model : str or Path
        A file or folder of another tool (a .gguf file, a folder with another tool's quantization_config), or a hub id
        of one.
    out : str or Path
        Folder to make; nothing may be there.
    told : Callable, optional
        Called with the bytes that are done and those of all.

    Returns
    -------
    ImportedModel

    Raises
    ------
    CheckpointError
        No importer knows the model, as it is a plain folder or one of ours already, or is none, or it is damaged.
    OutputError
        OUT is there already, or cannot be written, or its disk is too small.
    """
    out, path = Path(out).expanduser(), located(model)
    importer = find_importer(path)
    if importer is None:
        raise CheckpointError(_refusal(path))
    check_place(out, path)
    part = out.with_name(out.name + PART_SUFFIX)
    with disk_errors(out), FileLock(part.with_name(part.name + ".lock")) as lock:
        if not lock.acquire():
            raise OutputError(f"another process is writing {out}: wait for it, or choose another name")
        try:
            return _written(importer.open(path), out, part, told)
        finally:
            lock.path.unlink(missing_ok=True)


def _refusal(path: Path) -> str:
    """Why there is nothing to import."""
    resolve(path)  # what is no model at all has a sentence of its own
    with Checkpoint.open(path) as checkpoint:
        if is_coded(checkpoint):
            return f"{path} is a folder of featherweight's already: there is nothing to import, every command reads it"
        config = checkpoint.quantization_config
        if config is None:
            return f"{path} is a plain model already: there is nothing to import, every command reads it"
        known = ", ".join(registered("importer")) or "none"
        return (
            f"{path} is quantised by {str(config.get('quant_method'))[:40]!r}, which no importer here reads "
            f"(importers: {known})"
        )


def _written(imported: Imported, out: Path, part: Path, told: Told | None) -> ImportedModel:
    try:
        remove(part)  # of an attempt that was killed
        check_room(imported, part, "choose another --out")
        write_imported(imported, part, told)
        os.rename(part, out)
    except BaseException:
        remove(part)
        raise
    finally:
        imported.close()
    coded = sum(tensor.spec is not None for tensor in imported.tensors)
    total = sum(tensor.nbytes for tensor in imported.tensors)
    return ImportedModel(out, imported.origin, coded, len(imported.tensors) - coded, total, imported.notes)
