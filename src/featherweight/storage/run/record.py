"""featherweight-run.json: what is known of a compressed folder beside its weights.

The compression that made it (seconds, peak memory, machine, date, version), and what `feather eval` and `feather bench`
measured of it since. It has times in it, so it is the one file of an output that differs between equal runs; nothing
that reads weights reads it, and whoever deletes it loses figures of the report and nothing else.

    {"layout": 1, "compression": {...}, "evaluations": [{...}, ...], "speeds": [{...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import OutputError
from featherweight.storage.run.ownership import MANIFEST, RECORD
from featherweight.system.files import read_object, to_json, write_text

LAYOUT = 1
KEPT = 32
"""Of evaluations and of speeds: the last so many different ones."""
SAME = {
    "evaluations": (
        *("protocol", "context", "stride", "text_sha256", "text_tokens", "dtype", "against", "conversations"),
        "task_settings",
    ),
    "speeds": ("engine", "threads", "device", "prompt_tokens", "new_tokens", "context_tokens", "cache"),
}
"""Measurements that agree in these settings are of the same thing: the new one takes the place of the old one."""


def read_record(folder: Path) -> dict[str, Any]:
    """What is known; `compression` {}, `evaluations` and `speeds` [] where nothing is, or the file cannot be read."""
    found = read_object(folder / RECORD)
    if found.get("layout") != LAYOUT:
        found = {}
    compression = found.get("compression")
    lists = {name: [x for x in found.get(name) or () if isinstance(x, dict)] for name in SAME}
    return {"compression": compression if isinstance(compression, dict) else {}, **lists}


def compression_record(facts: Mapping[str, Any]) -> str:
    """The file of a folder that was just made."""
    return to_json({"layout": LAYOUT, "compression": dict(facts), "evaluations": [], "speeds": []})


def add_measurement(folder: str | Path, kind: str, measured: Mapping[str, Any]) -> bool:
    """Keep a result in the record of a folder that featherweight wrote; False, and nothing is touched, for any other
    folder, a file, or a model of the hub.

    Parameters
    ----------
    folder : str or Path
        As it was given to the command.
    kind : str
        "evaluations" or "speeds".
    measured : mapping
        What can be written as JSON, with the settings named in `SAME`.

    Raises
    ------
    OutputError
        The folder cannot be written to, or a file of that name is there that is no record.
    """
    place = Path(folder).expanduser()
    if not place.is_dir() or "identity" not in read_object(place / MANIFEST):
        return False
    path = place / RECORD
    if path.exists() and read_object(path).get("layout") != LAYOUT:
        raise OutputError(f"{path} is no record that this release can add to; move it away")
    record = read_record(place)
    settings = _settings(kind, measured)
    others = [old for old in record[kind] if _settings(kind, old) != settings]
    record[kind] = [*others, dict(measured)][-KEPT:]
    write_text(path, to_json({"layout": LAYOUT, **record}))
    return True


def _settings(kind: str, measured: Mapping[str, Any]) -> str:
    return json.dumps([measured.get(name) for name in SAME[kind]], default=str)
