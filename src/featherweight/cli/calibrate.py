"""`feather calibrate`: the statistics of a model's layers, gathered once for many runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from featherweight.cli.console import claim_json, error_console, facts, out_console, quiet_transformers, write_json
from featherweight.cli.progress import PLAIN_SECONDS
from featherweight.system.units import size_text, time_text


@dataclass(frozen=True)
class CalibrateOptions:
    """calibration : text; needs : names of statistics; changes : to the settings, like calibration.length=512"""

    calibration: str | None
    needs: list[str]
    changes: list[str]
    threads: int | None
    device: str
    max_device_memory: str | None
    overwrite: bool
    trust_remote_code: bool


def run_calibrate(model: str, out: Path, options: CalibrateOptions, json: Path | None) -> None:
    import yaml

    from featherweight.errors import RecipeError
    from featherweight.system.threads import use_threads
    from featherweight.tasks.compress.data import check_file
    from featherweight.tasks.compress.gather import gather_statistics

    claim_json(json, ("file", "bytes", "needs"))
    quiet_transformers()
    settings: dict[str, Any] = {}
    for change in options.changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"a change is written FIELD=VALUE, like calibration.length=512, but is {change!r}")
        place, value = settings, yaml.safe_load(value)
        *outer, last = name.removeprefix("calibration.").split(".")
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    check_file(options.calibration)
    with use_threads(options.threads), GatheringProgress(error_console()) as watch:
        chosen = [n.strip() for n in options.needs]
        written = gather_statistics(
            model, out, options.calibration, chosen, settings, device=options.device,
            max_device_memory=options.max_device_memory, overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code, notify=watch,
        )  # fmt: skip
    size = written.stat().st_size
    write_json(json, {"file": str(written), "bytes": size, "needs": options.needs})
    out_console().print(facts([("statistics", str(written)), ("size", size_text(size))]))


class GatheringProgress:
    """Shows how the gathering of statistics goes: what will be written first, then blocks, batches and the time left.

    Use as an observer inside a `with`. A block is its batches, which all take alike, and moving the samples on to the
    next one, which is the same network again without statistics: how much of a block that is shows in the first one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.fields[what]}"), BarColumn(), TextColumn("{task.fields[left]}"),
            console=console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=None, what="reading", left="")
        self.blocks = 0
        self.done = 0
        self.share = 1.0  # of a block's time that is its batches
        self.spoken = 0.0
        self.begun = self.block_begun = self.batches_ended = time.monotonic()

    def __enter__(self) -> GatheringProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "note":
            self._say(f"note: {event['text']}")
        elif event["event"] == "gathering":
            self.blocks = event["blocks"]
            self._say(
                f"statistics of {event['layers']} layers over {event['windows']} windows of {event['length']} tokens: "
                f"about {size_text(event['bytes'])} in {event['file']}"
            )
        elif event["event"] == "embedded":
            self._show(f"embedding, batch {event['batch']} of {event['batches']}", None)
            self.begun = self.block_begun = self.batches_ended = time.monotonic()
        elif event["event"] == "gradients":
            self._show(f"gradients, {event['step']} of {event['of']} windows", None, event.get("seconds_left"))
            self.begun = self.block_begun = self.batches_ended = time.monotonic()
        elif event["event"] == "gathered":
            self.batches_ended = time.monotonic()
            part = self.share * event["batch"] / event["batches"]
            what = f"block {event['block'] + 1} of {self.blocks}, batch {event['batch']} of {event['batches']}"
            self._show(what, (self.done + part) / max(1, self.blocks))
        elif event["event"] == "advanced":
            self._advanced(event)

    def _advanced(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if now > self.block_begun:
            self.share = (self.batches_ended - self.block_begun) / (now - self.block_begun)
        self.done, self.blocks, self.block_begun = self.done + 1, event["of"], now
        self._show(f"block {self.done} of {self.blocks} done", self.done / max(1, self.blocks))

    def _show(self, what: str, fraction: float | None, left: float | None = None) -> None:
        if fraction:
            left = (time.monotonic() - self.begun) * (1 - min(1.0, fraction)) / fraction
        text = "" if left is None else f"{time_text(left)} left"
        self.bar.update(self.task, what=what, left=text, completed=fraction or 0, total=1 if fraction else None)
        if not self.console.is_terminal and time.monotonic() - self.spoken >= PLAIN_SECONDS:
            self.spoken = time.monotonic()
            self._say(f"{what}, {text}" if text else what)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
