"""What is ours: `--overwrite` replaces what featherweight wrote, and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.format import METHOD, VERSION_KEY
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.system.files import read_object

MANIFEST = "featherweight.json"
RECORD = "featherweight-run.json"
"""What is known of the run and was measured since; see record.py."""
OWN_NAMES = re.compile(
    r"config\.json|featherweight(-run|-fit|-train)?\.json|README\.md|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
)
COPIED_NAMES = re.compile(  # what comes from the source; outputs made before their manifest listed their files
    r"(tokenizer|vocab|merges|licen[cs]e|notice|use_policy).*|(generation|preprocessor|processor)_config\.json|"
    r"(special_tokens_map|added_tokens|configuration)\.json|chat_template\.(jinja|json)|(modeling|configuration)_.*\.py",
    re.IGNORECASE,
)


def first_foreign(
    folder: Path, entries: Iterable[Path], beside: Collection[str] = (), ours: bool = False
) -> Path | None:
    """The first of `entries`, what a folder holds, that is no part of an output of ours; None if all of them are.

    beside : names of files that outputs take over from the source at hand
    ours : the folder is known to be an output, though it may lack what says so
    """
    found = sorted(entries)
    manifest = read_object(folder / MANIFEST)
    if not ours and "identity" not in manifest and not _is_ours(read_object(folder / "config.json")):
        return found[0] if found else None
    listed = manifest.get("files")
    known = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else None
    for path in found:
        own = OWN_NAMES.fullmatch(path.name) is not None
        own |= path.name in known if known is not None else path.name in beside or bool(COPIED_NAMES.match(path.name))
        if not own or (path.is_dir() and not path.is_symlink()):
            return path
    return None


def _is_ours(config: dict[str, Any]) -> bool:
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def is_written(path: Path) -> bool:
    """Whether a file is one that a run keeps its work in: safetensors with our version in the header, an empty lock, a
    verdict of an older release, or what was being written."""
    if re.fullmatch(r".+\.(safetensors|json)\.part|(transform|rounding|correction)(-\d+)?\.json", path.name):
        return True
    if path.suffix == ".lock" and path.is_file() and path.stat().st_size == 0:
        return True
    try:
        with SafetensorsFile.open(path) as file:
            return VERSION_KEY in file.metadata
    except CheckpointError:
        return False


def within(inner: Path, outer: Path) -> bool:
    """Whether `inner`, which need not exist, is the folder `outer` or lies in it, through links as well."""
    inner = inner.resolve()
    for place in (inner, *inner.parents):
        with contextlib.suppress(OSError):
            if os.path.samefile(place, outer):
                return True
    return False
