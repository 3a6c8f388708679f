"""Figures of the report, as SVG text: perplexity against bits, errors by layer, weights with their levels.

Colours are written as variables of the page's style sheet, so that a figure follows the reader's light or dark theme,
and text stays text. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

# Colours that stand for variables of the style sheet; `svg_of` puts the variables in.
INK, MUTED, GRID, SURFACE, ACCENT = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0101{n:02x}" for n in range(16, 22))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    ACCENT: "--accent",
    **{colour: f"--series-{n}" for n, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "D", "^", "v", "P")
ERROR_COLOURS = ("#f6efe2", "#f2cf9b", "#e59a5c", "#c75a3c", "#8c2a3e", "#43163a")
ERROR_MAP = LinearSegmentedColormap.from_list("error", ERROR_COLOURS)
BEND = 0.04  # excess, as a logarithm, below which the axis of perplexity is even and above which logarithmic
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "featherweight",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Point:
    """A variant in the plane of size and quality; `series` numbers its family, which gives colour and marker."""

    name: str
    bits: float
    perplexity: float
    series: int


class Tradeoff(NamedTuple):
    """The figure, and the names for which it had no room."""

    svg: str
    unnamed: list[str]


def tradeoff(points: Sequence[Point], original: float | None, width: int = 960, height: int = 470) -> Tradeoff:
    """Perplexity against bits per weight; the original as a line, the best variants for their size joined."""
    with rc_context(STYLE):
        figure, axes = figure_of(width, height, left=78, right=62, bottom=50, top=16)
        _scale_bits(axes, [p.bits for p in points])
        _scale_perplexity(axes, [p.perplexity for p in points], original)
        axes.set_xlabel("bits per weight, linear layers")
        axes.set_ylabel("perplexity")
        axes.grid(color=GRID, linewidth=0.8)
        best = frontier(points)
        axes.plot([p.bits for p in best], [p.perplexity for p in best], color=MUTED, linewidth=1.1, dashes=(1, 2.5))
        for p in points:
            marker, colour = MARKERS[p.series % len(MARKERS)], SERIES[p.series % len(SERIES)]
            axes.plot([p.bits], [p.perplexity], marker, color=colour, mec=SURFACE, mew=1.4, ms=10.5, zorder=4)
        taken = _mark_original(axes, original) if original else []
        unnamed = _label(axes, points, taken)
        return Tradeoff(svg_of(figure), unnamed)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Variants that no other one beats in both size and perplexity, from small to large."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (round(p.bits, 2), p.perplexity, p.name)):  # sizes that read alike are alike
        if not best or p.perplexity < best[-1].perplexity:
            best.append(p)
    return best


def _scale_bits(axes: Axes, bits: Sequence[float]) -> None:
    spread = max(max(bits) - min(bits), 0.5)
    axes.set_xlim(min(bits) - 0.09 * spread, max(bits) + 0.13 * spread)


def _scale_perplexity(axes: Axes, values: Sequence[float], original: float | None) -> None:
    """Stretched around the original, if that is known: variants within a few per cent of it and variants ten times as
    high are then told apart in one figure. Otherwise logarithmic."""
    base, bend = (original, BEND) if original else (min(values), 10.0)
    heights = [math.asinh(math.log(v / base) / bend) for v in [*values, base]]
    spread = max(max(heights) - min(heights), 0.2)
    low, high = min(heights) - 0.1 * spread, max(heights) + 0.1 * spread

    def down(place: Any) -> Any:
        return base * np.exp(bend * np.sinh(np.minimum(place, 20)))

    axes.set_yscale("function", functions=(lambda v: np.arcsinh(np.log(np.maximum(v, 1e-300) / base) / bend), down))
    axes.set_ylim(down(low), down(high))
    ticks = (
        excess_ticks(base, down(low), down(high)) if original else [(t, "") for t in round_numbers(*axes.get_ylim())]
    )
    ticks = _apart(axes, ticks)
    axes.yaxis.set_major_locator(FixedLocator([value for value, _ in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
    for value, text in ticks:
        at = ("axes fraction", "data")
        axes.annotate(
            text, (1, value), xycoords=at, xytext=(6, 0), textcoords="offset points", va="center", color=MUTED
        )


def _apart(axes: Axes, ticks: list[tuple[float, str]], least: float = 17) -> list[tuple[float, str]]:
    """Those that are at least so many pixels above the last one kept."""
    kept: list[tuple[float, str]] = []
    height = -math.inf
    for value, text in ticks:
        place = float(axes.transData.transform((0, value))[1])
        if place - height >= least:
            kept.append((value, text))
            height = place
    return kept


def excess_ticks(original: float, low: float, high: float) -> list[tuple[float, str]]:
    """(perplexity, its excess in words) at round excesses."""
    factors = [(1 + e / 100, f"{e:+d} %".replace("-", "\N{MINUS SIGN}")) for e in (-50, -20, -5, -2, 2, 5, 10, 20, 50)]
    factors += [(1.0, "\N{PLUS-MINUS SIGN}0")]
    factors += [(float(f), f"\N{MULTIPLICATION SIGN} {f:,}") for f in (2, 4, 10, 100, 1000, 10_000, 100_000, 10**6)]
    return [(original * f, text) for f, text in sorted(factors) if low <= original * f <= high]


def _short_number(value: float) -> str:
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def round_numbers(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers for a logarithmic axis, few enough to be read."""
    for digits in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def _mark_original(axes: Axes, original: float) -> list[Bbox]:
    """A line and its name at the left end, where no variant is both so small and so good. Returns what they cover."""
    axes.axhline(original, color=INK, linewidth=1.3, zorder=2)
    text = axes.annotate(
        f"original {original:,.4g}",
        (0, original),
        xycoords=("axes fraction", "data"),
        xytext=(8, 5),
        textcoords="offset points",
        va="bottom",
        weight="bold",
    )
    frame, y = axes.get_window_extent(_renderer(axes)), axes.transData.transform((0, original))[1]
    line = Bbox.from_extents(frame.x0, y - 1.5, frame.x1, y + 1.5)
    return [text.get_window_extent(_renderer(axes)).padded(2), line]


def _label(axes: Axes, points: Sequence[Point], taken: list[Bbox]) -> list[str]:
    """Names beside their points, each at the nearest place where it covers no point, line end or other name; returns
    those for which there is none. The best variants for their size are named first."""
    renderer = _renderer(axes)
    places = axes.transData.transform([(p.bits, p.perplexity) for p in points])
    taken = taken + [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in places]
    taken += [text.get_window_extent(renderer) for text in axes.texts]  # excesses at the right end
    frame = axes.get_window_extent(renderer)
    unnamed: list[str] = []
    best = {id(p) for p in frontier(points)}
    for i in sorted(range(len(points)), key=lambda i: (id(points[i]) not in best, -places[i][1], places[i][0])):
        probe = axes.text(0, 0, points[i].name, size=12)
        size = probe.get_window_extent(renderer)
        probe.remove()
        offset = _free_place(places[i], size.width, size.height, taken, frame)
        box = _box(places[i], offset, size.width, size.height)
        whole = box.x0 >= frame.x0 and box.x1 <= axes.figure.bbox.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1 + 8
        if not whole or sum(_overlap(box, other) for other in taken) > 0:
            unnamed.append(points[i].name)
            continue
        taken.append(box)
        far = math.hypot(*offset) > 26
        axes.annotate(
            points[i].name,
            (points[i].bits, points[i].perplexity),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 4 else "right" if offset[0] < -4 else "center",
            va="center",
            size=12,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 6} if far else None,
        )
    return unnamed


def _free_place(place: np.ndarray, width: float, height: float, taken: list[Bbox], frame: Bbox) -> tuple[float, float]:
    angles = [math.radians(a) for a in (0, 90, 180, 270, 35, 325, 145, 215, 60, 300, 120, 240)]
    best, least = (12.0, 0.0), math.inf
    for radius in (12, 17, 24, 34, 46, 60, 78, 100, 130):
        for rank, angle in enumerate(angles):
            offset = (radius * math.cos(angle), radius * math.sin(angle))
            box = _box(place, offset, width, height)
            covered = sum(_overlap(box, other) for other in taken)
            outside = width * height - _overlap(box, frame)
            cost = 5 * (covered + max(0.0, outside)) + radius + 0.5 * rank
            if cost < least:
                best, least = offset, cost
    return best


def _box(place: np.ndarray, offset: tuple[float, float], width: float, height: float) -> Bbox:
    shift = 0 if offset[0] > 4 else -width if offset[0] < -4 else -width / 2
    return Bbox.from_bounds(place[0] + offset[0] + shift, place[1] + offset[1] - height / 2, width, height)


def _overlap(one: Bbox, other: Bbox) -> float:
    wide = float(min(one.x1, other.x1) - max(one.x0, other.x0))
    high = float(min(one.y1, other.y1) - max(one.y0, other.y0))
    return max(0.0, wide) * max(0.0, high)


@dataclass(frozen=True)
class ErrorGrid:
    """Relative errors [roles, blocks] of one variant; NaN where there is no such layer.

    outside : roles and errors of layers that stand in no block, where others do: the embedding, the output layer
    """

    roles: tuple[str, ...]
    errors: np.ndarray
    outside: tuple[tuple[str, float], ...] = ()

    @property
    def mean(self) -> float:
        """Of all layers of the map that have an error."""
        return float(np.nanmean(self.errors))


def error_grid(layers: Sequence[Mapping[str, Any]]) -> ErrorGrid | None:
    """From `layers: [{name, relative_error}]`. A block is the first number in a name, a role what follows it; experts
    of a block are averaged. Names without a number stand in no block, and beside the map if other layers do. None if no
    layer has an error."""
    cells: dict[tuple[str, int], list[float]] = {}
    outside: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        error, name = layer.get("relative_error"), str(layer.get("name", ""))
        if not isinstance(error, int | float) or not math.isfinite(error):
            continue
        found = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
        block, path = (int(found[1]), found[2]) if found else (0, name)
        role = re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "", path).removesuffix(".weight")
        (cells if found else outside).setdefault((role, block), []).append(float(error))
    if not cells:
        cells, outside = outside, {}
    if not cells:
        return None
    roles = tuple(dict.fromkeys(role for role, _ in cells))
    errors = np.full((len(roles), max(block for _, block in cells) + 1), np.nan)
    for (role, block), values in cells.items():
        errors[roles.index(role), block] = np.mean(values)
    return ErrorGrid(_short(roles), errors, tuple((r.rpartition(".")[2], e[0]) for (r, _), e in outside.items()))


def _short(roles: tuple[str, ...]) -> tuple[str, ...]:
    """Last part of each path, if that tells them apart."""
    last = tuple(role.rpartition(".")[2] for role in roles)
    return last if len(set(last)) == len(last) else roles


def error_limits(grids: Sequence[ErrorGrid]) -> tuple[float, float]:
    """Colour scale that all variants share."""
    values = np.concatenate([grid.errors[np.isfinite(grid.errors) & (grid.errors > 0)] for grid in grids] or [[]])
    if not len(values):
        return 1e-3, 1.0
    return float(values.min()) / 1.05, float(values.max()) * 1.05


def error_map(grid: ErrorGrid, limits: tuple[float, float], width: int = 330) -> str:
    """Heat map, blocks from left to right, roles from top to bottom."""
    rows, columns = grid.errors.shape
    margin = 8 + 6.6 * max(len(role) for role in grid.roles)
    with rc_context(STYLE):
        figure, axes = figure_of(width, 42 + 17 * rows, left=margin, right=4, bottom=36, top=2)
        values = np.ma.masked_where(~(grid.errors > 0), grid.errors)  # no layer, or stored exactly: left blank
        axes.pcolormesh(values, cmap=ERROR_MAP, norm=LogNorm(*limits), edgecolor="none", linewidth=0)
        label_map(axes, grid.roles, columns)
        return svg_of(figure)


def label_map(axes: Axes, roles: Sequence[str], columns: int) -> None:
    """Names of roles from top to bottom, numbers of blocks from left to right, and no frame."""
    axes.set_yticks(np.arange(len(roles)) + 0.5, list(roles), size=11)
    axes.invert_yaxis()
    ticks = [int(t) for t in MaxNLocator(5, integer=True).tick_values(0, max(1, columns - 1)) if 0 <= t < columns]
    axes.set_xticks(np.array(ticks) + 0.5, [str(t) for t in ticks], size=11)
    axes.set_xlabel("block", size=11, labelpad=1)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def histogram(data: Mapping[str, Any], series: int = 0, width: int = 330, height: int = 148) -> str:
    """The spread of the layer's weights, the levels of one group as lines, and that group's weights as ticks below."""
    edges, counts = np.asarray(data["edges"], float), np.asarray(data["counts"], float)
    density = counts / max(counts.max(initial=0.0), 1.0)
    with rc_context(STYLE):
        figure, axes = figure_of(width, height, left=16, right=16, bottom=22, top=4)
        axes.stairs(density, edges, fill=True, color=GRID, zorder=1)
        axes.stairs(density, edges, color=MUTED, linewidth=0.9, zorder=2, baseline=None)
        levels = data.get("levels") or []
        axes.vlines(levels, 0, 1.1, color=SERIES[series % len(SERIES)], linewidth=1.5, zorder=3)
        weights = data.get("weights") or []
        axes.vlines(weights, -0.2, -0.07, color=INK, linewidth=0.6, zorder=2)
        axes.set_ylim(-0.22, 1.13)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.tick_params(labelsize=11, length=3, color=GRID)
        axes.spines["left"].set_visible(False)
        return svg_of(figure)


def figure_of(width: float, height: float, left: float, right: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """A figure measured in pixels, as are its margins."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasAgg(figure)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    return figure, figure.add_axes(box)


def _renderer(axes: Axes) -> Any:
    return FigureCanvasAgg(axes.figure).get_renderer()


def svg_of(figure: Figure) -> str:
    """An <svg> element for use inside HTML."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names repeat from figure to figure and nothing refers to them
    text = re.sub(r"font: ((?:bold |\d+ )?)([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would apply to the whole page
    text = re.sub(r"\s*\n\s*", " ", text).replace("xlink:href", "href").replace("> <", "><")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    text = re.sub(
        r"(<svg)[^>]*>", rf'\1 viewBox="0 0 {width} {height}" width="{width}" height="{height}">', text, count=1
    )
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1].strip()}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"
