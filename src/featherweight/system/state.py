"""What commands remember between runs, in the folder that the system has for it.

That is $XDG_STATE_HOME/featherweight, else ~/.local/state/featherweight; on Windows %LOCALAPPDATA%\\featherweight.
Nothing there is needed: where it cannot be written, nothing is remembered, and nobody is told.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

MOST_LINES = 1000
"""Entries of a history that are kept."""


def state_folder() -> Path | None:
    """Where it lies, whether it is there or not; None where the user has no home."""
    if named := os.environ.get("XDG_STATE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None):
        return Path(named) / "featherweight" if Path(named).is_absolute() else None
    try:
        return Path.home() / ".local" / "state" / "featherweight"
    except RuntimeError:
        return None


class History:
    """Texts that were entered, the oldest first, in a file with a JSON string on each line."""

    def __init__(self, name: str, keep: bool = True) -> None:
        """keep : read those of earlier runs, and write those of this one for later ones"""
        folder = state_folder() if keep else None
        self._path = None if folder is None else folder / f"{name}.jsonl"
        self.entries: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = [] if self._path is None else self._path.read_text(encoding="utf-8").splitlines()
            self.entries = [text for line in lines if (text := _text_of(line))]
        if len(self.entries) > MOST_LINES:
            self.entries = self.entries[-MOST_LINES:]
            self._write("w", self.entries)

    def add(self, text: str) -> None:
        """Remember a text, unless it is the last one."""
        if self.entries[-1:] != [text]:
            self.entries.append(text)
            self._write("a", [text])

    def _write(self, mode: str, texts: list[str]) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError, UnicodeEncodeError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "a" else os.O_TRUNC)
            with os.fdopen(os.open(self._path, flags, 0o600), mode, encoding="utf-8") as stream:
                stream.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)


def _text_of(line: str) -> str:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, str) else ""
    return ""
