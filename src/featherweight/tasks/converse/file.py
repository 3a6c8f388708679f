"""Files of conversations: JSON lines, of which the first says how the others came to be (docs/format.md).

While conversations are written they stand in FILE.part, a whole line each; the file has its name when all are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from featherweight.errors import CalibrationError, OutputError, shown
from featherweight.model.text.documents import HEADER
from featherweight.system.files import PART_SUFFIX, disk_errors
from featherweight.system.locks import FileLock

SUFFIX = ".jsonl"
WORDS = {"model": "another model", "template": "another chat template", "prompts": "other prompts"}
"""What a difference in a field of the header means; other fields are settings."""


class ConversationFile:
    """A file that is read, and written further; use inside a `with`, whose end gives it its name.

    Parameters
    ----------
    path : ends with .jsonl
    header : how the conversations come to be; a file with another one is refused

    Attributes
    ----------
    rows : the conversations, in order, each as its line says

    Raises
    ------
    CalibrationError
        it has conversations of another header, is damaged, or is no such file.
    OutputError
        it cannot be written, or another process writes it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        if path.suffix != SUFFIX:
            raise OutputError(f"conversations are kept as JSON lines: {path} must end with {SUFFIX}")
        self.path, self.part = path, path.with_name(path.name + PART_SUFFIX)
        self.header = json.loads(json.dumps(header))
        self.rows: list[dict[str, Any]] = []
        self._lock = FileLock(path.with_name(path.name + ".lock"), make_folder=True)
        self._stream: BinaryIO | None = None

    def __enter__(self) -> ConversationFile:
        if not self._lock.acquire():
            raise OutputError(f"another process writes the conversations {self.path}: wait, or name another file")
        try:
            found = [self._read(path) for path in (self.path, self.part) if os.path.lexists(path)]
        except BaseException:
            self._let_go()
            raise
        self.rows = max(found, key=len, default=[])
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Write one more; it is on the disk when this returns."""
        with disk_errors(self.part):
            if self._stream is None:
                self._stream = self.part.open("wb")
                self._stream.writelines(_line(one) for one in (self.header, *self.rows))
            self._stream.write(_line(row))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.rows.append(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self.path):
                if self._stream is not None:
                    self._stream.close()
                if kind is None and self.part.exists():
                    if self._stream is not None or not self.path.exists():
                        os.replace(self.part, self.path)
                    else:
                        self.part.unlink()  # of a run that was stopped, shorter than the whole file
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._lock.path.unlink(missing_ok=True)
        self._lock.release()

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """The rows of a file; of an unfinished one without a line that was not written to its end."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"cannot read the conversations {path}: {error.strerror or error}") from None
        lines = content.split(b"\n")
        torn = lines.pop()
        if torn and path == self.path:
            lines.append(torn)
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                usable = isinstance(row, dict) and (number == 1 or isinstance(row.get("messages"), list))
            except (ValueError, RecursionError):
                usable = False
            if number == 1 and (not usable or HEADER not in row):
                raise CalibrationError(
                    f"{path} is no file of conversations that featherweight wrote, so it is not replaced: name another "
                    "file, or give it as a text"
                )
            if not usable:
                raise CalibrationError(f"line {number} of the conversations {path} is damaged: remove the file")
            rows.append(row)
        if not rows and path == self.path:
            raise CalibrationError(f"the file of conversations {path} is empty: remove it")
        if rows:
            self._check(path, rows[0])
        return rows[1:]

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        """CalibrationError where the header is another one."""
        for name in (HEADER, *self.header):
            if found.get(name) == self.header.get(name):
                continue
            reason = WORDS.get(name)
            if reason is None:
                reason = f"other settings ({name} is {shown(found.get(name))}, not {shown(self.header.get(name))})"
            raise CalibrationError(
                f"the conversations {path} were made with {reason}: remove the file, or name another one "
                "(--out of `feather converse`, calibration.conversations.file of a recipe)"
            )


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
