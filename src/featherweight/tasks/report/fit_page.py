"""The page of a fit: what more or fewer bytes would buy, and which layer got what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.pages.render import render, style
from featherweight.system.files import disk_errors, replacing
from featherweight.tasks.report.fit_plots import choice_map, front_figure, legend_of


def write_fit_page(path: str | Path, result: Mapping[str, Any], model: str) -> Path:
    """Write the page of what `Fit.to_json` gives; the same input gives the same bytes. OutputError where that fails."""
    front = [point for point in result["front"] if point["kl"] > 0]
    figure, outside = choice_map(result["layers"])
    html = render(
        "fit.html.jinja",
        style=style(),
        model=model,
        result=result,
        front=result["front"],
        wide=front_figure(front) if front else "",
        narrow=front_figure(front, 340, 400) if front else "",
        map=figure,
        outside=outside,
        legend=legend_of(result["layers"]),
    )
    path = Path(path)
    with disk_errors(path), replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path
