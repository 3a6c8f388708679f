"""`feather train`: options as settings, a live table of the training, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from featherweight.cli.console import claim_json, error_console, facts, out_console, quiet_transformers, write_json
from featherweight.cli.progress import LiveTable
from featherweight.system.units import count_text, size_text, time_text


@dataclass(frozen=True)
class TrainOptions:
    """Keywords of `featherweight.train.run`, and where else the result goes."""

    out: Path
    recipe: str
    model: str | None
    config: Path | None
    tokenizer: Path | None
    text: str | None
    held_out: str | None
    changes: list[str]
    device: str
    threads: int | None
    overwrite: bool
    trust_remote_code: bool


class TrainWatcher(LiveTable):
    """Shows the events of a training; use as its observer inside a `with`."""

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("note", "precision"):
            self._say(event["text"] if kind == "precision" else f"note: {event['text']}")
        elif kind == "training":
            layers = f"{event['layers']} layers, {count_text(event['weights'])} of them low-bit weights"
            layers = layers if event["layers"] else "nothing of it low-bit"
            self._say(
                f"{event['recipe']} ({event['choices']}): {count_text(event['parameters'])} parameters, {layers}; "
                f"{event['steps']} steps, {count_text(event['tokens'])} tokens"
            )
        elif kind == "train":
            self.rows.append(event)
            if self._may_say() or (self.live is None and event["step"] == event["of"]):
                self._say(self._line(event))
        elif kind == "evaluation":
            if self.rows:
                self.rows[-1]["held_out"] = event["held_out"]
            if self.live is None:
                self._say(f"step {event['step']}: {event['held_out']:.4f} nats a token on held-out text")
        if self.live is not None:
            self.live.update(self._view())

    def _line(self, event: dict[str, Any]) -> str:
        parts = [f"[{event['step']}/{event['of']}] loss {event['loss']:.4f}"]
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
        if "flipped" in event:
            parts.append(f"{100 * event['flipped']:.3f} % flipped, {100 * event['dead']:.1f} % off")
        parts.append(f"{time_text(event['seconds_left'])} left")
        return ", ".join(parts)

    def _view(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("step", "loss", "held out", "rate", "tokens/s", "flipped", "off", "left"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                f"{row['step']}/{row['of']}",
                f"{row['loss']:.4f}",
                f"{row['held_out']:.4f}" if "held_out" in row else "",
                f"{row['learning_rate']:.2e}",
                f"{row['tokens_per_second']:,.0f}",
                f"{100 * row['flipped']:.3f} %" if "flipped" in row else "-",
                f"{100 * row['dead']:.1f} %" if "dead" in row else "-",
                time_text(row["seconds_left"]),
            )
        return table


def run_train(options: TrainOptions, settings: dict[str, Any], html: Path | None, json: Path | None) -> None:
    """settings : fields of TrainSettings"""
    from featherweight.tasks.train.settings import TrainSettings
    from featherweight.tasks.train.training import run

    claim_json(json, ("held_out", "history"))
    quiet_transformers()
    asked = dict(options.__dict__)
    out, recipe, model = asked.pop("out"), asked.pop("recipe"), asked.pop("model")
    with TrainWatcher(error_console()) as watcher:
        result = run(out, recipe, model, settings=TrainSettings(**settings), observer=watcher, **asked)
    report = result.to_json()
    write_json(json, report)
    if html is not None:
        from featherweight.tasks.report.train_page import write_train_page

        write_train_page(html, report)
    rows = [
        ("output", str(result.out)),
        ("recipe", result.recipe),
        ("steps", f"{result.steps}, {count_text(result.tokens)} tokens"),
        ("loss", f"{result.loss:.4f} nats a token; {result.held_out:.4f} on held-out text"),
        ("size", f"{size_text(result.bytes)}, {result.bits_per_weight:.3f} bits a low-bit weight"),
        ("time", time_text(result.seconds)),
    ]
    out_console().print(facts(rows))
