"""Progress of a compression: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import abc
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from featherweight.system.units import count_text, size_text, time_text

SHOWN = 8  # finished layers kept in view
PLAIN_SECONDS = 2.0  # between plain lines


Shown = TypeVar("Shown", bound="LiveTable")


class LiveTable(abc.ABC):
    """A table that is drawn anew while work goes on, on a terminal; lines elsewhere. Used inside a `with`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.rows: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self.spoken = 0.0

    def __enter__(self: Shown) -> Shown:
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet:
            self.live = Live(self._view(), console=self.console, refresh_per_second=8, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    @abc.abstractmethod
    def _view(self) -> RenderableType:
        """What stands on the terminal now."""

    def _may_say(self) -> bool:
        """Whether a plain line is due: there is no terminal, and the last one was a while ago."""
        if self.live is not None or time.monotonic() - self.spoken < PLAIN_SECONDS:
            return False
        self.spoken = time.monotonic()
        return True

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Watcher(LiveTable):
    """Shows the events of `compress`; use as its observer inside a `with`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar = Progress(
            TextColumn("{task.fields[what]}"), BarColumn(), TextColumn("{task.fields[left]}"), console=console
        )
        self.task = self.bar.add_task("", total=1, what="reading", left="")
        self.begun = time.monotonic()
        self.told: set[str] = set()

    def __call__(self, event: dict[str, Any]) -> None:
        show: dict[str, Callable[[dict[str, Any]], None]] = {
            "plan": self._plan,
            "layer": self._layer,
            "shard": self._shard,
            "note": self._note,
            "step": self._step,
            "precision": self._precision,
        }
        if event["event"] in show:
            show[event["event"]](event)
        elif "step" in event and "of" in event:
            facts: dict[str, Any] = {name: event[name] for name in ("of", "seconds_left") if name in event}
            self._show_left(event.get("run_seconds_left"))
            self._step({"stage": event["event"], "number": event["step"], **facts})
        if self.live is not None:
            self.live.update(self._view())

    def _plan(self, event: dict[str, Any]) -> None:
        counts = {kind: count for kind, count in event["tensors"].items() if kind not in ("replaced", "copied")}
        others = ", ".join(
            [f"{event['tensors']['copied']} tensors copied", *(f"{count} {kind}" for kind, count in counts.items())]
        )
        self._say(
            f"{event['recipe']} on {event['family']}, {event['blocks']} blocks, {count_text(event['parameters'])} "
            f"parameters: {event['layers']} layers ({count_text(event['weights'])} weights) to "
            f"{event['bits_per_weight']:.3f} bits{self._outside(event)}; {others}; "
            f"{size_text(event['source_bytes'])} become {size_text(event['output_bytes'])}"
        )
        self.bar.update(self.task, what="compressing")

    @staticmethod
    def _outside(event: dict[str, Any]) -> str:
        bits = event.get("bits_per_weight_outside")
        return "" if bits is None else f", embedding and output layer to {bits:.3f}"

    def _layer(self, event: dict[str, Any]) -> None:
        self.rows.append(event)
        facts = ["found finished"] if event["resumed"] and not event["weights_per_second"] else []
        facts += [f"{count_text(event['weights_per_second'])}/s"] if event["weights_per_second"] else []
        facts += [f"{time_text(event['seconds_left'])} left"] if event["seconds_left"] is not None else []
        facts.append(f"peak {size_text(event['peak_memory_bytes'])}")
        self.bar.update(self.task, left="  ".join(facts))
        self._show_left(event["seconds_left"])
        if self._may_say() or (self.live is None and event["number"] == event["of"]):
            self._say(
                f"[{event['number']}/{event['of']}] {event['name']}: {event['code']}, "
                f"{event['bits_per_weight']:.3f} bits, error {event['relative_error']:.4f}, {', '.join(facts)}"
            )

    def _show_left(self, seconds: float | None) -> None:
        """The bar is of time: layers, passes of the network and tunings take very different parts of it."""
        if seconds is not None:
            gone = time.monotonic() - self.begun
            self.bar.update(self.task, completed=gone, total=gone + seconds)

    def _shard(self, event: dict[str, Any]) -> None:
        self.bar.update(self.task, what=f"writing {event['number']} of {event['of']}", left="")

    def _note(self, event: dict[str, Any]) -> None:
        """Something the user must know: a layer that fell back, text that is short."""
        self._say(f"note: {event['text']}")

    def _precision(self, event: dict[str, Any]) -> None:
        """Which type training passes are made in; said once, though every block of a model chooses."""
        if event["text"] not in self.told:
            self.told.add(event["text"])
            self._say(event["text"])

    def _step(self, event: dict[str, Any]) -> None:
        """Progress within a long stage: {"stage": "tuning scales", "number": 20, "of": 300, ...}."""
        what = f"{event['stage']} {event['number']}/{event['of']}"
        if event.get("seconds_left"):
            what += f", {time_text(event['seconds_left'])} left"
        self.bar.update(self.task, what=what)
        if self._may_say():
            self._say(what)

    def _view(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name, justify in (("layer", "left"), ("code", "left"), ("bits", "right"), ("error", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(row["name"], row["code"], f"{row['bits_per_weight']:.3f}", f"{row['relative_error']:.4f}")
        return Group(table, self.bar) if self.rows else Group(self.bar)
