"""Figures of a fit: divergence against size with the chosen model, and which layer went which way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from featherweight.system.units import size_text
from featherweight.tasks.report.plots import (
    ACCENT,
    ERROR_MAP,
    GRID,
    INK,
    MUTED,
    STYLE,
    SURFACE,
    figure_of,
    label_map,
    round_numbers,
    svg_of,
)


def front_figure(front: Sequence[Mapping[str, Any]], width: int = 960, height: int = 430) -> str:
    """KL divergence, on a logarithmic axis, against bytes: what might have been made, and what was."""
    points = [point for point in front if point["kl"] > 0]
    sizes, kls = [point["bytes"] / 1e6 for point in points], [point["kl"] for point in points]
    with rc_context(STYLE):
        figure, axes = figure_of(width, height, left=78, right=24, bottom=50, top=16)
        axes.set_yscale("log")
        axes.plot(sizes, kls, color=MUTED, linewidth=1.2, marker="o", ms=4, mfc=SURFACE, mec=MUTED)
        for point in points:
            if point["chosen"]:
                here = (point["bytes"] / 1e6, point["kl"])
                axes.plot([here[0]], [here[1]], "D", color=ACCENT, mec=SURFACE, mew=1.4, ms=11, zorder=4)
                axes.annotate(
                    f"{size_text(point['bytes'])}, {point['kl']:.3g}",
                    here,
                    xytext=(12, 10),
                    textcoords="offset points",
                    color=INK,
                    weight="bold",
                )
        low, high = min(kls) / 1.3, max(kls) * 1.3
        axes.set_ylim(low, high)
        ticks = round_numbers(low, high, 7)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_major_locator(MaxNLocator(6 if width > 500 else 4))
        axes.set_xlabel("MB of the weight files")
        axes.set_ylabel("KL divergence, nats")
        axes.grid(color=GRID, linewidth=0.8)
        return svg_of(figure)


def choice_map(layers: Sequence[Mapping[str, Any]], width: int = 330) -> tuple[str, list[str]]:
    """Bits a weight of every layer by role and block, light to dark, and what stands outside the blocks in words."""
    inside = [layer for layer in layers if layer["block"] is not None]
    outside = [f"{layer['role']}: {layer['choice']}" for layer in layers if layer["block"] is None]
    if not inside:
        return "", outside
    roles = list(dict.fromkeys(layer["role"] for layer in inside))
    bits = np.full((len(roles), 1 + max(layer["block"] for layer in inside)), np.nan)
    for layer in inside:
        bits[roles.index(layer["role"]), layer["block"]] = layer["bits"]
    steps = sorted({round(float(value), 2) for value in bits[np.isfinite(bits)]})
    margin = 8 + 6.6 * max(len(role) for role in roles)
    with rc_context(STYLE):
        figure, axes = figure_of(width, 42 + 17 * len(roles), left=margin, right=4, bottom=36, top=2)
        colours = ListedColormap([ERROR_MAP(i / max(1, len(steps) - 1)) for i in range(len(steps))])
        edges = [steps[0] - 1, *[(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)], steps[-1] + 1]
        axes.pcolormesh(
            np.ma.masked_invalid(bits), cmap=colours, norm=BoundaryNorm(edges, len(steps)), edgecolor="none"
        )
        label_map(axes, roles, bits.shape[1])
        return svg_of(figure), outside


def legend_of(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, float]]:
    """(colour, choice, layers, bits a weight) in the order of the map's colours."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        if layer["block"] is not None:
            found.setdefault(layer["choice"], []).append(layer["bits"])
    ordered = sorted(found.items(), key=lambda item: sum(item[1]) / len(item[1]))
    values = sorted({round(bits, 2) for each in found.values() for bits in each})
    legend = []
    for name, bits in ordered:
        mean = sum(bits) / len(bits)
        place = min(range(len(values)), key=lambda i: abs(values[i] - mean)) / max(1, len(values) - 1)
        r, g, b, _ = ERROR_MAP(place)
        colour = f"#{math.floor(r * 255):02x}{math.floor(g * 255):02x}{math.floor(b * 255):02x}"
        legend.append((colour, name, len(bits), mean))
    return legend
