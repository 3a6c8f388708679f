"""Progress in notebooks: one line with a bar that is drawn anew, below the cell that does the work."""

from __future__ import annotations

import sys
import time
from typing import Any

from featherweight.pages.render import render

SECONDS = 0.3  # between drawings


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def progress_here(what: str) -> NotebookProgress | None:
    """Progress for whoever gave none, where this is a notebook."""
    return NotebookProgress(what) if in_notebook() else None


class NotebookProgress:
    """An observer of runs; `count` takes the done and all windows of an evaluation. What must be known stays below it.

    what : what is done, in a word or two
    """

    def __init__(self, what: str) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self.what, self.text, self.notes = what, "", list[str]()
        self.fraction: float | None = None
        self.begun, self.drawn = time.monotonic(), 0.0
        self._handle = display(HTML(self._page()), display_id=True)

    def __call__(self, event: dict[str, Any]) -> None:
        """An event of a run, see docs of `compress`."""
        kind, left = event["event"], None
        if kind == "note":
            self.notes.append(str(event["text"]))
        elif kind == "layer":
            left = event.get("seconds_left")
            self.text = (
                f"layer {event['number']} of {event['of']}, {event['name']}, error {event['relative_error']:.4f}"
            )
        elif kind == "shard":
            self.text = f"writing {event['number']} of {event['of']}"
        elif "step" in event and "of" in event:
            left = event.get("run_seconds_left")
            self.text = f"{kind} {event['step']} of {event['of']}"
        elif kind == "done":
            self.text, self.fraction = f"done in {event['seconds']:.1f} s", 1.0
        if left is not None:
            gone = time.monotonic() - self.begun
            self.fraction = gone / max(gone + left, 1e-9)
            self.text += f", {_time(left)} left"
        self._draw(kind in ("note", "done"))

    def count(self, done: int, total: int) -> None:
        """So many of all windows are done."""
        self.fraction, self.text = done / max(1, total), f"window {done} of {total}"
        self._draw(done == total)

    def _draw(self, now: bool) -> None:
        if now or time.monotonic() - self.drawn >= SECONDS:
            self.drawn = time.monotonic()
            if self._handle is not None:
                self._handle.update(self._html(self._page()))

    def _page(self) -> str:
        return render("progress.html.jinja", what=self.what, text=self.text, fraction=self.fraction, notes=self.notes)


def _time(seconds: float) -> str:
    whole = int(seconds + 0.5)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole // 60 % 60:0{2 if hours else 1}d}:{whole % 60:02d}"
