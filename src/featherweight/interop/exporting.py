"""Writing a folder in another format: checked first, atomically, nothing replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import OutputError
from featherweight.interop.exports import Exported, Exporter, Told, Verdict, exporter_named, refuse_impossible
from featherweight.interop.stored import StoredModel
from featherweight.storage.run.ownership import within
from featherweight.system.files import PART_SUFFIX, disk_errors


def export(
    model: str | Path, to: str, out: str | Path, *, settings: Mapping[str, Any] | None = None, told: Told | None = None
) -> Exported:
    """Write a model in another tool's format.

    Parameters
    ----------
    model : str or Path
        A folder of ours or a plain one, or whatever else a command takes as a model.
    to : str
        The format: a name on the axis `exporter`, "gguf".
    out : str or Path
        File or folder to make; nothing may be there.
    settings : Mapping, optional
        Of the format.
    told : Callable, optional
        Called with what is done and all there is, in bytes of values read.

    Returns
    -------
    Exported

    Raises
    ------
    RecipeError
        No such format or setting.
    CheckpointError
        The model cannot be read, or the format has no place for it.
    OutputError
        A tensor cannot be written, `out` is there already, or the disk says no.
    """
    exporter, out = exporter_named(to, dict(settings or {})), Path(out).expanduser()
    with StoredModel(model) as stored:
        check_out(out, stored)
        refuse_impossible(exporter.verdicts(stored), exporter.title)
        part = out.with_name(out.name + PART_SUFFIX)
        try:
            with disk_errors(out):
                verdicts = _write(exporter, stored, part, told)
                os.rename(part, out)
        except BaseException:
            remove(part)
            raise
    sizes = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return Exported(out, verdicts, sum(path.stat().st_size for path in sizes))


def _write(exporter: Exporter, stored: StoredModel, part: Path, told: Told | None) -> tuple[Verdict, ...]:
    remove(part)  # of an attempt that was killed
    if not exporter.is_file:
        part.mkdir()
    return tuple(exporter.write(stored, part, told or (lambda done, total: None)))


def check_out(out: Path, stored: StoredModel) -> None:
    """OutputError where the result has no place: something is there, its folder is not, or it is within the model."""
    check_place(out, stored.folder)


def check_place(out: Path, model: Path) -> None:
    """`check_out`, of a model that is this file or folder."""
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} is there already: choose another name, or move it away")
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} is not there: make it first")
    if within(out, model):
        raise OutputError(f"{out} lies within the model's own folder: choose a place outside of it")


def remove(path: Path) -> None:
    """Take away what an attempt has left, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
