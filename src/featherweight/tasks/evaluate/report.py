"""The report: one HTML file that opens offline, with figures inside, for a model and its compressed variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

import yaml

from featherweight.system.files import disk_errors, replacing
from featherweight.tasks.evaluate import plots

DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Variant:
    """One row of the report. Whatever is missing is left out of the page.

    evaluation : as of `feather eval --json`
    compression : as of `feather compress --json`
    sample : text that the variant wrote
    recipe : its recipe
    histograms : results of `levels.histogram_of`
    family : variants of a family share a colour; the first word of the name if not given
    original : it is the uncompressed model
    command : what made it
    """

    name: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    compression: Mapping[str, Any] = field(default_factory=dict)
    sample: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    histograms: Sequence[Mapping[str, Any]] = ()
    family: str = ""
    original: bool = False
    command: str = ""

    @classmethod
    def of(cls, data: Variant | Mapping[str, Any]) -> Variant:
        """From a mapping with the same fields; unknown ones and nulls are ignored."""
        if isinstance(data, cls):
            return data
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in data.items() if k in known and v is not None}  # type: ignore[union-attr]
        return cls(**{"name": "unnamed", **given})

    def number(self, *path: str) -> float | None:
        """A finite number of the evaluation, or of the compression after "compression"; None if there is none."""
        value: Any = self.compression if path[0] == "compression" else self.evaluation
        for key in path[1:] if path[0] == "compression" else path:
            value = value.get(key) if isinstance(value, Mapping) else None
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if usable else None

    @property
    def perplexity(self) -> float | None:
        return self.number("perplexity")

    @property
    def linear_bits(self) -> float | None:
        return _first(self.number("bits_per_weight", "linear"), self.number("compression", "bits_per_weight"))


@dataclass(frozen=True)
class _Page:
    """All variants, the original apart, with what several sections need."""

    variants: list[Variant]
    originals: list[Variant]
    families: dict[str, int]
    perplexity: float | None

    @classmethod
    def of(cls, variants: Iterable[Variant]) -> _Page:
        everything = list(variants)
        originals = [v for v in everything if v.original]
        rest = [v for v in everything if not v.original]
        names = dict.fromkeys(_family(v) for v in rest)
        given = [v.perplexity for v in originals] + [v.number("perplexity_against") for v in rest]
        return cls(rest, originals, {name: i for i, name in enumerate(names)}, _first(*given))

    def series(self, variant: Variant) -> int:
        return self.families.get(_family(variant), 0)

    def excess(self, variant: Variant) -> float | None:
        """Per cent above the original's perplexity."""
        if variant.perplexity is None or not self.perplexity or variant.original:
            return None
        return 100 * (variant.perplexity / self.perplexity - 1)


def write_report(
    path: str | Path,
    variants: Sequence[Variant | Mapping[str, Any]],
    model: str = "model",
    parameters: int | None = None,
    prompt: str | None = None,
    commands: Sequence[str] = (),
) -> Path:
    """Write the page. `prompt` is what the samples continue, `commands` what made the whole run.

    The same input gives the same bytes. The file is written aside and renamed, so a reader never sees half of it.
    OutputError where it cannot be written.
    """
    page = _Page.of(Variant.of(v) for v in variants)
    sections = [
        _header(page, model, parameters),
        _tradeoff(page),
        _table(page),
        _errors(page),
        _histograms(page),
        _details(page, prompt),
        _protocol(page, commands),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    html = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(model)} {DASH} featherweight report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )
    return _write(Path(path), html)


def _write(path: Path, html: str) -> Path:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path


def _header(page: _Page, model: str, parameters: int | None) -> str:
    subject = page.originals[0] if page.originals else None
    count = _first(parameters, subject.number("size", "model_weights") if subject else None)
    facts = [f"{_count(count)} parameters" if count else "", f"{len(page.variants)} compressed variants"]
    tokens = next((v.number("tokens") for v in [*page.originals, *page.variants] if v.number("tokens")), None)
    facts.append(f"{tokens:,.0f} tokens scored" if tokens else "")
    tiles = "".join(
        f'<div class="tile"><span class="label">{label}</span><strong>{escape(value)}</strong>'
        f'<span class="note">{escape(note)}</span></div>'
        for label, value, note in _findings(page)
    )
    return (
        f'<header>\n<p class="eyebrow">featherweight report</p>\n<h1>{escape(model)}</h1>\n'
        f'<p class="facts">{" · ".join(f for f in facts if f)}</p>\n'
        f"{f'<div class=tiles>{tiles}</div>' if tiles else ''}\n</header>\n"
    )


def _findings(page: _Page) -> list[tuple[str, str, str]]:
    """(label, value, note) of what a reader wants to know first."""
    found = []
    if page.perplexity:
        original = page.originals[0] if page.originals else None
        stored = original.number("bytes") if original else None
        found.append(("Original", f"{page.perplexity:,.4g}", "perplexity" + (f", {_bytes(stored)}" if stored else "")))
    measured = [(v, e, b) for v in page.variants if (e := page.excess(v)) is not None and (b := v.linear_bits)]
    whole = all(v.number("bytes") for v, _, _ in measured)

    def size(variant: Variant, bits: float) -> float:
        """Of the whole file, where all are known: an embedding that is kept may be half of it."""
        return (variant.number("bytes") or 0.0) if whole else bits

    def facts(variant: Variant, excess: float, bits: float) -> str:
        return f"{excess:+.2f} %, {_bytes(size(variant, bits))}" if whole else f"{excess:+.2f} % at {bits:.2f} bits"

    if measured:
        best = min(measured, key=lambda m: (m[1], size(m[0], m[2])))
        found.append(("Closest to it", best[0].name, facts(*best)))
    for limit in (1, 5, 10, 30, 50):
        near = [m for m in measured if m[1] <= limit]
        if near:
            best = min(near, key=lambda m: (size(m[0], m[2]), m[1]))
            if best[0].name not in [value for _, value, _ in found]:
                found.append((f"Smallest within {limit} %", best[0].name, facts(*best)))
    return found[:4]


def _tradeoff(page: _Page) -> str:
    points = [
        plots.Point(v.name, v.linear_bits, v.perplexity, page.series(v))
        for v in page.variants
        if v.linear_bits and v.perplexity
    ]
    if not points:
        return ""
    figures = (
        f'<div class="wide">{plots.tradeoff(points, page.perplexity)}</div>\n'
        f'<div class="narrow">{plots.tradeoff(points, page.perplexity, 372, 430)}</div>'
    )
    note = (
        "Bits count everything stored for the linear layers: codes, scales, zero points. Right: perplexity over the "
        "original's; the axis is stretched near it. The dotted line joins the variants that no other one beats in both "
        "size and perplexity."
    )
    return _section("Perplexity against size", note, f"<figure>{figures}</figure>")


@dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[Variant], float | None]
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] = min
    extra: Callable[[Variant], str] | None = None


def _columns(page: _Page) -> list[_Column]:
    def plain(digits: int) -> Callable[[float], str]:
        return lambda value: f"{value:,.{digits}f}"

    def error_of(variant: Variant) -> str:
        ratio, error = variant.number("log_ratio"), variant.number("log_ratio_standard_error")
        return f"± {100 * error * math.exp(min(ratio, 50.0)):,.2f}" if ratio is not None and error else ""

    def control_error(variant: Variant) -> str:
        error = variant.number("control_tokens", "kl_standard_error")
        count, rest = (variant.number("control_tokens", name) for name in ("positions", "kl_elsewhere"))
        if error is None or count is None or rest is None:
            return ""
        return f"± {error:.4f}; elsewhere {rest:.4f}; {count:,.0f} positions"

    return [
        _Column("Bits, linear", lambda v: v.linear_bits, plain(2)),
        _Column("Bits, model", lambda v: v.number("bits_per_weight", "model"), plain(2)),
        _Column("On disk", lambda v: v.number("bytes"), _bytes),
        _Column("Perplexity", lambda v: v.perplexity, _perplexity),
        _Column("Excess, %", page.excess, lambda e: f"{e:+,.2f}", min, error_of),
        _Column("KL, nats", lambda v: v.number("kl"), lambda x: f"{x:.4f}"),
        _Column("Top-1, %", lambda v: v.number("top1_agreement"), lambda x: f"{100 * x:.1f}", max),
        _Column("KL, control", lambda v: v.number("control_tokens", "kl"), lambda x: f"{x:.4f}", min, control_error),
        _Column(
            "Top-1, control, %", lambda v: v.number("control_tokens", "top1_agreement"), lambda x: f"{100 * x:.1f}", max
        ),
        _Column("P(control)", lambda v: v.number("control_tokens", "probability"), lambda x: f"{x:.3f}", max),
        _Column("Time, s", lambda v: v.number("compression", "seconds"), plain(1)),
        _Column("Peak memory", lambda v: v.number("compression", "peak_memory_bytes"), _bytes),
    ]


def _table(page: _Page) -> str:
    rows = [*page.originals, *page.variants]
    columns = [c for c in _columns(page) if any(c.value(v) is not None for v in rows)]
    best = {c.title: _best(c, page.variants) for c in columns}
    head = "".join(f'<th scope="col">{c.title}</th>' for c in columns)
    body = "".join(
        f'<tr{" class=original" if v.original else ""}><th scope="row">{_swatch(page, v)}{escape(v.name)}</th>'
        + "".join(_cell(c, v, best[c.title]) for c in columns)
        + "</tr>\n"
        for v in rows
    )
    note = (
        "The best compressed variant of each column is marked. Excess is over the original's perplexity, ± one "
        "standard error paired over windows. KL divergence and top-1 agreement compare every prediction with the "
        "original's. Time and peak memory are those of the compression."
    )
    if any(v.number("control_tokens", "kl") is not None for v in rows):
        note += (
            " Control: positions of conversations whose next token is one that the chat template writes as a mark; "
            "P(control) is the variant's mean probability of such a token where it is the original's top-1."
        )
    warned = "".join(
        f'<p class="note"><b>{escape(v.name)}.</b> {escape(text)}</p>\n' for v in rows if (text := _warning_of(v))
    )
    head = f'<thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
    table = f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}</tbody>\n</table></div>'
    return _section("All numbers", note, table + warned)


def _warning_of(variant: Variant) -> str:
    """What was said of its control tokens."""
    found = variant.evaluation.get("control_tokens")
    text = found.get("warning") if isinstance(found, Mapping) else None
    return text if isinstance(text, str) else ""


def _best(column: _Column, variants: Sequence[Variant]) -> str | None:
    """The best value as it is shown, so that equal-looking ones are marked alike; None where nothing is to compare."""
    values = [value for v in variants if (value := column.value(v)) is not None]
    differ = len({column.show(value) for value in values}) > 1
    return column.show(column.best(values)) if differ else None


def _cell(column: _Column, variant: Variant, best: str | None) -> str:
    value = column.value(variant)
    if value is None:
        return f'<td class="none">{DASH}</td>'
    shown = column.show(value)
    extra = column.extra(variant) if column.extra else ""
    aside = f" <small>{extra}</small>" if extra else ""
    marked = shown == best and not variant.original
    return f"<td{' class=best' if marked else ''}>{f'<b>{shown}</b>' if marked else shown}{aside}</td>"


def _swatch(page: _Page, variant: Variant) -> str:
    colour = "--ink" if variant.original else f"--series-{page.series(variant) % len(plots.SERIES)}"
    return f'<span class="swatch" style="background:var({colour})"></span>'


def _errors(page: _Page) -> str:
    grids = [(v, g) for v in page.variants if (g := plots.error_grid(v.compression.get("layers") or []))]
    if not grids:
        return ""
    limits = plots.error_limits([grid for _, grid in grids])
    colours = ", ".join(plots.ERROR_COLOURS)
    scale = (
        f'<div class="scale"><span>{limits[0]:.2g}</span>'
        f'<i style="background:linear-gradient(90deg, {colours})"></i><span>{limits[1]:.2g}</span></div>'
    )
    maps = "".join(
        f"<figure><figcaption>{_swatch(page, v)}<b>{escape(v.name)}</b> {_means(grid)}</figcaption>"
        f"{plots.error_map(grid, limits)}</figure>\n"
        for v, grid in grids
    )
    note = (
        "Relative error ‖W − Ŵ‖ / ‖W‖ of every linear layer, on one logarithmic colour scale for all variants. "
        "Cells are blank where a layer is kept as it is; embedding and output layer are beside the mean of the map."
    )
    return _section("Error by layer", note, f'{scale}<div class="grid">{maps}</div>')


def _means(grid: plots.ErrorGrid) -> str:
    """The mean of the map, and the errors of layers that stand in no block."""
    return f"mean {grid.mean:.3g}" + "".join(f", {escape(role)} {error:.3g}" for role, error in grid.outside)


def _histograms(page: _Page) -> str:
    layers = dict.fromkeys(str(h.get("layer", "")) for v in page.variants for h in v.histograms)
    if not layers:
        return ""
    parts = []
    for layer in layers:
        figures = "".join(
            f"<figure><figcaption>{_swatch(page, v)}<b>{escape(v.name)}</b> {_levels_note(h)}</figcaption>"
            f"{plots.histogram(h, page.series(v))}</figure>\n"
            for v in page.variants
            for h in v.histograms
            if str(h.get("layer", "")) == layer and h.get("edges") and h.get("counts")
        )
        parts.append(f'<h3><code>{escape(layer)}</code></h3>\n<div class="grid">{figures}</div>\n')
    note = (
        "Grey: how the weights of the whole layer are spread. Coloured lines: the values that the weights of one group "
        "may take, for the group of median error. Ticks below: the weights of that group. "
        "Where a layer is rotated its weights have no fixed values, and there are no lines."
    )
    return _section("Weights and their levels", note, "".join(parts))


def _levels_note(data: Mapping[str, Any]) -> str:
    count, error = len(data.get("levels") or ()), data.get("relative_error")
    parts = [f"{count} levels" if count else "", f"error {error:.3g}" if isinstance(error, float) else ""]
    return ", ".join(p for p in parts if p)


def _details(page: _Page, prompt: str | None) -> str:
    cards = "".join(_card(page, v) for v in [*page.originals, *page.variants] if v.sample or v.recipe or v.command)
    if not cards:
        return ""
    asked = (
        f"All texts continue: <q>{escape(prompt)}</q>" if prompt else "A text that each variant wrote, and its recipe."
    )
    return _section("What each variant writes", asked, f'<div class="cards">{cards}</div>', raw=True)


def _card(page: _Page, variant: Variant) -> str:
    sample = f"<blockquote>{escape(variant.sample.strip())}</blockquote>" if variant.sample.strip() else ""
    recipe = ""
    if variant.recipe:
        text = yaml.safe_dump(_plain(variant.recipe), sort_keys=False, allow_unicode=True, default_flow_style=False)
        recipe = f"<details><summary>Recipe</summary><pre>{escape(text.strip())}</pre></details>"
    command = f"<pre class=command>{escape(variant.command)}</pre>" if variant.command else ""
    return f"<article><h3>{_swatch(page, variant)}{escape(variant.name)}</h3>{sample}{recipe}{command}</article>\n"


def _plain(value: Any) -> Any:
    """Only what YAML can say."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _protocol(page: _Page, commands: Sequence[str]) -> str:
    sentences: dict[str, list[str]] = {}
    for variant in [*page.originals, *page.variants]:
        description = variant.evaluation.get("description")
        if description:
            sentences.setdefault(str(description), []).append(variant.name)
    parts = []
    for sentence, names in sentences.items():
        whose = f"<b>{escape(', '.join(names))}.</b> " if len(sentences) > 1 else ""
        parts.append(f"<p>{whose}{escape(sentence)}</p>\n")
    if commands:
        parts.append(f"<pre class=command>{escape(chr(10).join(commands))}</pre>\n")
    return _section("How it was measured", "", "".join(parts)) if parts else ""


def _section(title: str, note: str, content: str, raw: bool = False) -> str:
    lead = f'<p class="lead">{note if raw else escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{title}</h2>\n{lead}{content}\n</section>\n"


def _family(variant: Variant) -> str:
    return variant.family or (variant.name.split() or [""])[0]


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _count(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _perplexity(value: float) -> str:
    return f"{value:,.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"


def _bytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
