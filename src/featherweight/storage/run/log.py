"""What happens in a run, event by event: to OUT.log.jsonl, and to whoever watches."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from featherweight.errors import FeatherError, OutputError
from featherweight.events import Observer
from featherweight.system.files import disk_errors


class Events:
    """Every event to OUT.log.jsonl, with the time, and to the observer."""

    def __init__(self, out: Path, observer: Observer | None) -> None:
        self.path = out.with_name(out.name + ".log.jsonl")
        self.observer = observer
        self.lock = threading.Lock()
        self.stream: TextIO | None = None

    def __enter__(self) -> Events:
        with disk_errors(self.path):
            if not _is_log(self.path):
                raise OutputError(
                    f"{self.path} is where the events of this run go, but featherweight did not write it; move it away "
                    "or choose another --out"
                )
            _drop_torn_line(self.path)
            self.stream = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            with contextlib.suppress(FeatherError):  # a full disk must not hide what happened
                self({"event": "stopped", "reason": str(error) or type(error).__name__})
        if self.stream is not None:
            with contextlib.suppress(OSError):  # what could not be written stays in its buffer, and close tries again
                self.stream.close()

    def __call__(self, event: dict[str, Any]) -> None:
        with self.lock:
            if self.stream is not None:
                with disk_errors(self.path):
                    self.stream.write(json.dumps({"time": round(time.time(), 3), **event}, default=str) + "\n")
                    self.stream.flush()
        if self.observer is not None:
            self.observer(event)


def _is_log(path: Path) -> bool:
    """Whether a file is a log of ours, or there is nothing yet: it begins with an event, or with the start of one."""
    if not os.path.lexists(path):
        return True
    with path.open("rb") as stream:
        first = stream.readline(1 << 20)
    try:
        found = json.loads(first)
    except ValueError:
        return b'{"time"'.startswith(first[:7])  # torn
    return isinstance(found, dict) and "event" in found


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that has no end, left by a full disk or a crash."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)
