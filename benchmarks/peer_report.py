"""Rows of quality_vs_peers.py: their JSON, their table, and their plot (standalone SVG for both themes)."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from featherweight.pages.render import style
from featherweight.tasks.report import plots

OURS = "featherweight"
COMPRESSED, KEPT, PUT_BACK = "compressed", "kept", "put back"
SERIES = {"llama.cpp": 0, "llm-compressor": 1, OURS: 2, "hqq": 3, "nncf": 4, "turbopress": 5}
LEAST_EXCESS, LEAST_KL = 0.02, 1e-4  # per cent and nats: what is below lies on the plot's lower edge
CAUTION = (
    "Caution: this model's weights lie on a 4-bit grid in groups of 32 columns (it comes from a file of that kind), so "
    "types with these very groups (Q4_0, Q4_1, IQ4_NL, what falls back to them) meet it halfway."
)


@dataclass(frozen=True)
class Row:
    """One measured model. `seed` is that of the calibration windows, None for a data-free method.

    `bits` and `embedding_bits` are a weight of the linear layers inside the blocks, and of embedding and output layer
    together (a tied one counts once); `file_bytes` those of the weight file. `embedding` says whether the tool
    compressed it, kept it, or compressed it and the original was put back for this row, in predictions and in size.
    `excess` is perplexity over that of the original, minus 1; KL in nats a token.
    """

    name: str
    tool: str
    version: str
    bits: float | None
    perplexity: float
    excess: float
    excess_standard_error: float | None
    kl: float | None
    seconds: float | None
    seed: int | None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    embedding: str = KEPT
    embedding_bits: float | None = None
    file_bytes: int | None = None
    top1_agreement: float | None = None

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.tool, self.name, self.seed

    @property
    def label(self) -> str:
        return f"{self.tool} {self.name}" + (", linears only" if self.embedding == PUT_BACK else "")


@dataclass
class Report:
    """What the JSON file holds: `setting` is all but rows and failures, and must be equal for rows to be comparable."""

    setting: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Report:
        found = json.loads(path.read_text())
        known = {f.name for f in fields(Row)}
        rows = [Row(**{key: value for key, value in row.items() if key in known}) for row in found.pop("rows")]
        return cls(rows=rows, failures=found.pop("failures", []), setting=found)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self.setting, "rows": [asdict(row) for row in self.rows], "failures": self.failures}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(path)

    def add(self, row: Row) -> None:
        same = (*row.key, row.embedding)
        self.rows = [old for old in self.rows if (*old.key, old.embedding) != same]
        self.rows.append(row)
        self.failures = [f for f in self.failures if (f["tool"], f["name"], f["seed"]) != row.key]

    def fail(self, tool: str, name: str, seed: int | None, reason: str) -> None:
        self.failures = [f for f in self.failures if (f["tool"], f["name"], f["seed"]) != (tool, name, seed)]
        self.failures.append({"tool": tool, "name": name, "seed": seed, "reason": reason})

    def has(self, tool: str, name: str, seed: int | None, scope: str) -> bool:
        """Whether the rows that `scope` asks for are there."""
        found = {row.embedding for row in self.rows if row.key == (tool, name, seed)}
        file, linears = bool(found & {COMPRESSED, KEPT}), bool(found & {PUT_BACK, KEPT})
        return {"file": file, "linears": linears, "both": file and linears}[scope]


@dataclass(frozen=True)
class Line:
    """Rows of one method with several seeds: means, and half the range of the excess in per cent as its spread."""

    rows: tuple[Row, ...]

    def mean(self, name: str) -> float | None:
        values = [value for row in self.rows if (value := getattr(row, name)) is not None]
        return statistics.fmean(values) if values else None

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def spread(self) -> float | None:
        excess = [100 * row.excess for row in self.rows]
        return (max(excess) - min(excess)) / 2 if len(excess) > 1 else None

    @property
    def megabytes(self) -> float | None:
        size = self.mean("file_bytes")
        return None if size is None else size / 1e6


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """From the largest file to the smallest."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.tool, row.name, row.embedding), []).append(row)
    lines = [Line(tuple(group)) for group in groups.values()]
    return sorted(lines, key=lambda line: (-(line.megabytes or 0), -(line.first.bits or 0)))


def markdown(report: Report) -> str:
    """The table, with what it must be read with and what failed."""
    setting = report.setting
    text = [f"{setting['protocol']}", "", f"Original: perplexity {setting['original_perplexity']:.3f}"]
    text += ["", CAUTION] if setting.get("four_bit_grid") else []
    text += [
        "",
        "| method | bits, linear | bits, embedding | MB, whole file | perplexity | excess, % | ± over seeds | KL "
        "| top-1, % | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines_of(report.rows):
        cells = [
            line.first.label,
            _number(line.mean("bits"), ".3f"),
            _number(line.mean("embedding_bits"), ".2f"),
            _number(line.megabytes, ".1f"),
            _number(line.mean("perplexity"), ".3f"),
            _number(100 * (line.mean("excess") or 0.0), "+.2f"),
            _number(line.spread, ".2f"),
            _number(line.mean("kl"), ".4f"),
            _number(None if (agreed := line.mean("top1_agreement")) is None else 100 * agreed, ".1f"),
            _number(line.mean("seconds"), ".0f"),
            ", ".join(str(row.seed) for row in line.rows if row.seed is not None),
        ]
        text.append("| " + " | ".join(cells) + " |")
    text += ["", *_notes(report)]
    return "\n".join(text).rstrip()


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else f"{value:{shape}}"


def _notes(report: Report) -> list[str]:
    notes = [f"- {line.first.label}: {line.first.note}" for line in lines_of(report.rows) if line.first.note]
    tokenizers = {row.details.get("tokenizer_bytes") for row in report.rows} - {None, 0}
    if tokenizers:
        size = max(tokenizers) / 1e6
        notes.append(
            f"- llama.cpp's file holds the tokenizer, too ({size:.1f} MB); the others' lies beside the weights."
        )
    if any(row.embedding == PUT_BACK for row in report.rows):
        notes.append("- linears only: the original's embedding in place of the compressed one, in the size as well.")
    notes += [f"- left out: {f['tool']} {f['name']}: {f['reason']}" for f in report.failures]
    return notes


@dataclass(frozen=True)
class Measure:
    """What an axis shows, of a line of the table."""

    title: str
    value: Callable[[Line], float | None]


BITS = Measure("bits per weight, linear layers", lambda line: line.mean("bits"))
MEGABYTES = Measure("MB, whole file", lambda line: line.megabytes)
EXCESS = Measure("excess perplexity, %", lambda line: max(LEAST_EXCESS, 100 * (line.mean("excess") or 0.0)))
KL = Measure("KL from the original", lambda line: None if (kl := line.mean("kl")) is None else max(LEAST_KL, kl))


def write_plots(report: Report, path: Path) -> list[Path]:
    """The plot at `path`, and one for narrow screens, its panels below each other, at NAME-narrow.svg."""
    narrow = path.with_name(f"{path.stem}-narrow{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot(report) + "\n")
    narrow.write_text(plot(report, columns=1) + "\n")
    return [path, narrow]


def plot(report: Report, columns: int = 2) -> str:
    """Excess perplexity above and KL below, both logarithmic: left against bits of the linear layers, right against
    the size of the whole file. One column: all below each other."""
    panels = [(size, quality) for quality in (EXCESS, KL) for size in (BITS, MEGABYTES)]
    width, height = (960, 430) if columns == 2 else (400, 360)
    tools = [tool for tool in SERIES if any(row.tool == tool for row in report.rows)]
    top = 34 if columns == 2 else 22 * math.ceil(len(tools) / 2) + 12
    rows = len(panels) // columns
    whole = top + rows * height
    with rc_context({**plots.STYLE, "font.size": 12}):
        figure = Figure(figsize=(width / 72, whole / 72), dpi=72, facecolor="none")
        FigureCanvasAgg(figure)
        for number, (size, quality) in enumerate(panels):
            row, column = divmod(number, columns)
            left, bottom = column * width / columns + 56, whole - top - (row + 1) * height + 48
            box = (left / width, bottom / whole, (width / columns - 68) / width, (height - 64) / whole)
            _panel(figure.add_axes(box), report, size, quality)
        figure.legend(
            handles=[_mark(tool) for tool in tools],
            loc="upper center",
            ncols=len(tools) if columns == 2 else 2,
            frameon=False,
            bbox_to_anchor=(0.5, 1.0),
            borderaxespad=0.3,
            handletextpad=0.3,
            columnspacing=1.4,
        )
        return _standalone(plots.svg_of(figure))


def _mark(tool: str) -> Line2D:
    return Line2D([], [], label=tool, linestyle="none", **_look(tool))


def _look(tool: str) -> dict[str, Any]:
    series = SERIES.get(tool, 5)
    colour, size = plots.SERIES[series], 12 if tool == OURS else 9
    return {"marker": plots.MARKERS[series], "color": colour, "mec": plots.SURFACE, "mew": 1.2, "ms": size}


def _panel(axes: Axes, report: Report, size: Measure, quality: Measure) -> None:
    points: list[tuple[Row, float, float]] = []
    for line in _shown(lines_of(report.rows), size):
        x, y = size.value(line), quality.value(line)
        if x is not None and y is not None and math.isfinite(y):
            points.append((line.first, x, y))
    axes.set_yscale("log")
    if not points:
        return
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    spread, decades = max(max(xs) - min(xs), 0.5), max(math.log10(max(ys) / min(ys)), 0.3)
    axes.set_xlim(min(xs) - 0.06 * spread, max(xs) + 0.1 * spread)
    axes.set_ylim(min(ys) / 10 ** (0.08 * decades), max(ys) * 10 ** (0.08 * decades))
    ticks = plots.round_numbers(*axes.get_ylim(), most=7)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(size.title, labelpad=3)
    axes.set_title(quality.title, loc="left", size=12, color=plots.INK, pad=6)
    axes.grid(color=plots.GRID, linewidth=0.8)
    axes.tick_params(length=0)
    for row, x, y in points:
        axes.plot([x], [y], **_look(row.tool), linestyle="none", zorder=5 if row.tool == OURS else 4)
    _name(axes, points)


def _shown(lines: list[Line], size: Measure) -> list[Line]:
    """Files as they are; against bits of the linear layers, rather those with the original's embedding put back."""
    back = {(line.first.tool, line.first.name) for line in lines if line.first.embedding == PUT_BACK}
    if size is BITS:
        return [x for x in lines if x.first.embedding != COMPRESSED or (x.first.tool, x.first.name) not in back]
    return [x for x in lines if x.first.embedding != PUT_BACK]


def _name(axes: Axes, points: list[tuple[Row, float, float]]) -> None:
    """Names beside their points: of ours first, then of the best for their size, then of others while there is room."""
    renderer = plots._renderer(axes)
    places = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    frame = axes.get_window_extent(renderer)
    best = {p.name for p in plots.frontier([plots.Point(row.label, x, y, 0) for row, x, y in points])}
    order = sorted(
        range(len(points)),
        key=lambda i: (points[i][0].tool != OURS, points[i][0].label not in best, points[i][2]),
    )
    for i in order:
        row, x, y = points[i]
        weight = "bold" if row.tool == OURS else "normal"
        probe = axes.text(0, 0, row.name, size=10.5, weight=weight)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        offset = plots._free_place(places[i], extent.width, extent.height, taken, frame)
        box = plots._box(places[i], offset, extent.width, extent.height)
        if row.tool != OURS and (sum(plots._overlap(box, other) for other in taken) or math.hypot(*offset) > 40):
            continue
        taken.append(box)
        far = math.hypot(*offset) > 26
        axes.annotate(
            row.name,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 4 else "right" if offset[0] < -4 else "center",
            va="center",
            size=10.5,
            weight=weight,
            color=plots.INK if row.tool == OURS else plots.MUTED,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": plots.MUTED, "linewidth": 0.6, "shrinkB": 5} if far else None,
        )


def _standalone(svg: str) -> str:
    """An SVG file that brings the colours of both themes and its own background."""
    css = style().partition("* {")[0]
    rules = re.sub(r"\s+", " ", css) + 'text { font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif; }'
    head = f"<style>{rules}</style>" + '<rect width="100%" height="100%" rx="6" fill="var(--surface)"/>'
    return re.sub(r"<svg ([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg" \1>{head}', svg, count=1)
