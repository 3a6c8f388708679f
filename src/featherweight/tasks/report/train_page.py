"""The page of a training: losses, learning rate, and what its codes did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from featherweight.pages.render import render, style
from featherweight.system.files import disk_errors, replacing
from featherweight.tasks.report.plots import ACCENT, GRID, INK, MUTED, STYLE, SURFACE, figure_of, svg_of

Line = tuple[str, str, Sequence[float], Sequence[float]]
"""What it is, its colour, steps, values."""


def write_train_page(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write the page of what `Training.to_json` gives; the same input gives the same bytes. OutputError where that
    fails."""
    history = result["history"]
    logged = [line for line in history if "loss" in line]
    held = [line for line in history if "held_out" in line]
    steps = [line["step"] for line in logged]
    losses: list[Line] = [
        ("training text", MUTED, steps, [line["loss"] for line in logged]),
        ("held-out text", ACCENT, [line["step"] for line in held], [line["held_out"] for line in held]),
    ]
    rates: list[Line] = [("learning rate", ACCENT, steps, [line["learning_rate"] for line in logged])]
    coded = [line for line in logged if "flipped" in line]
    flips: list[Line] = [
        ("flipped in a step", ACCENT, [line["step"] for line in coded], [100 * line["flipped"] for line in coded])
    ]
    dead: list[Line] = [("off", ACCENT, [line["step"] for line in coded], [100 * line["dead"] for line in coded])]
    figures = [
        ("Loss", "nats a token", losses),
        ("Learning rate", "", rates),
        *([("Weights whose code flips in a step", "%", flips), ("Weights that are off", "%", dead)] if coded else []),
    ]
    html = render(
        "train.html.jinja",
        style=style(),
        result=result,
        name=Path(result["out"]).name,
        figures=[
            (title, curves(unit, lines), curves(unit, lines, 340, 300)) for title, unit, lines in figures if lines[0][2]
        ],
        held=held,
    )
    path = Path(path)
    with disk_errors(path), replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path


def curves(unit: str, lines: Sequence[Line], width: int = 960, height: int = 300) -> str:
    """Lines over steps, each with its name at its end where there are several."""
    with rc_context(STYLE):
        figure, axes = figure_of(width, height, left=70, right=24, bottom=46, top=14)
        for name, colour, steps, values in lines:
            axes.plot(
                steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) < 24 else "", ms=4, mec=SURFACE
            )
            if len(lines) > 1 and len(steps):
                axes.annotate(
                    name,
                    (steps[0], values[0]),
                    xytext=(8, 4 if colour == MUTED else -12),
                    textcoords="offset points",
                    color=INK if colour == ACCENT else MUTED,
                )
        axes.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("steps")
        axes.set_ylabel(unit)
        axes.grid(color=GRID, linewidth=0.8)
        return svg_of(figure)
