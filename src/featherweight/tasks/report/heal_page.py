"""The page of a healing: scores before and after, and the course of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from featherweight.pages.render import render, style
from featherweight.system.files import disk_errors, replacing
from featherweight.tasks.report.plots import ACCENT, GRID, MUTED, STYLE, SURFACE, figure_of, svg_of


def write_heal_page(path: str | Path, result: Mapping[str, Any], model: str) -> Path:
    """Write the page of what `Healing.to_json` gives. OutputError where that fails."""
    curve = _in_a_row(result["curve"])
    html = render(
        "heal.html.jinja",
        style=style(),
        model=model,
        result=result,
        wide=curve_figure(curve) if len(curve) > 1 else "",
        narrow=curve_figure(curve, 340, 300) if len(curve) > 1 else "",
    )
    path = Path(path)
    with disk_errors(path), replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path


def _in_a_row(curve: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Trainings one behind the other: steps go on where those of the one before ended."""
    found: list[dict[str, float]] = []
    base = last = 0.0
    for point in curve:
        if point["step"] < last:
            base += last
        last = point["step"]
        found.append({**point, "step": base + last})
    return found


def curve_figure(curve: Sequence[Mapping[str, float]], width: int = 960, height: int = 360) -> str:
    """Loss against steps."""
    checks = [(point["step"], point["held_out"]) for point in curve if "held_out" in point]
    with rc_context(STYLE):
        figure, axes = figure_of(width, height, left=64, right=16, bottom=50, top=16)
        axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=MUTED, linewidth=1.2)
        axes.plot(*zip(*checks, strict=True), "D-", color=ACCENT, mec=SURFACE, ms=8) if checks else None
        axes.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 4, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(color=GRID, linewidth=0.8)
        return svg_of(figure)
