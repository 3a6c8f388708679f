"""Tables of the report: quality and size, what a run took, and which layer got what."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.pages.render import DASH, bytes_text, perplexity_text
from featherweight.tasks.report.variants import Page, Variant, number_in


@dataclass(frozen=True)
class Cell:
    """text, what stands smaller beside it, whether it is the best of its column, and whether nothing is known."""

    text: str
    aside: str = ""
    best: bool = False
    none: bool = False


@dataclass(frozen=True)
class Row:
    """A variant's row; `series` None for the original."""

    name: str
    series: int | None
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Column:
    """value : a number, or None where it is not known; best : min or max, None where none is better
    absent : what stands where nothing is known"""

    title: str
    value: Callable[[Variant], float | None]
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None = min
    extra: Callable[[Variant], str] | None = None
    absent: str = DASH


def _plain(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _excess_error(variant: Variant) -> str:
    ratio, error = variant.number("log_ratio"), variant.number("log_ratio_standard_error")
    return f"± {100 * error * math.exp(min(ratio, 50.0)):,.2f}" if ratio is not None and error else ""


def _error_of(name: str, digits: int) -> Callable[[Variant], str]:
    def told(variant: Variant) -> str:
        error = variant.number(name)
        return f"± {error:,.{digits}f}" if error else ""

    return told


def _control_error(variant: Variant) -> str:
    error = variant.number("control_tokens", "kl_standard_error")
    count, rest = (variant.number("control_tokens", name) for name in ("positions", "kl_elsewhere"))
    if error is None or count is None or rest is None:
        return ""
    return f"± {error:.4f}; elsewhere {rest:.4f}; {count:,.0f} positions"


def quality_columns(page: Page) -> list[Column]:
    """Sizes, and how far a variant is from the original."""

    def control(name: str) -> Callable[[Variant], float | None]:
        return lambda v: v.number("control_tokens", name)

    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    return [
        Column("Bits, linear", lambda v: v.linear_bits, _plain(2)),
        Column("Bits, model", lambda v: v.number("bits_per_weight", "model"), _plain(2)),
        Column("On disk", lambda v: v.number("bytes"), bytes_text),
        Column(
            "Perplexity", lambda v: v.perplexity, perplexity_text, min, _error_of("perplexity_standard_error", 2),
            "not measured",
        ),
        Column("Excess, %", page.excess, lambda e: f"{e:+,.2f}", min, _excess_error),
        Column("KL, nats", lambda v: v.number("kl"), _plain(4), min, _error_of("kl_standard_error", 4)),
        Column("Top-1, %", lambda v: v.number("top1_agreement"), percent, max),
        Column("KL, control", control("kl"), _plain(4), min, _control_error),
        Column("Top-1, control, %", control("top1_agreement"), percent, max),
        Column("P(control)", control("probability"), _plain(3), max),
    ]  # fmt: skip


def cost_columns() -> list[Column]:
    """What the compression took, and how fast the result is."""

    def recorded(name: str) -> Callable[[Variant], float | None]:
        """What the run's own record says, else what was handed over with the result."""

        def value(variant: Variant) -> float | None:
            own = variant.number("record", name)
            return variant.number("compression", name) if own is None else own

        return value

    def went_on(variant: Variant) -> str:
        found = variant.number("record", "resumed")
        return f"the last part; {found:.0f} layers were found finished" if found else ""

    def before(variant: Variant) -> str:
        found = variant.number("record", "resident_at_start_bytes")
        return f"{bytes_text(found)} before it began" if found else ""

    def after(variant: Variant) -> str:
        tokens = variant.number("speed", "context_tokens")
        threads = variant.number("speed", "threads")
        engine = variant.speed.get("engine")
        return f"{engine}, {threads:.0f} threads, after {tokens:,.0f}" if engine and threads and tokens else ""

    absent = "not recorded"
    return [
        Column("Time, s", recorded("seconds"), _plain(1), min, went_on, absent),
        Column("Peak memory", recorded("peak_memory_bytes"), bytes_text, min, before, absent),
        Column(
            "Writes, tokens/s", lambda v: v.number("speed", "decode_tokens_per_second"), _plain(1), max, after,
            "not measured",
        ),
        Column(
            "Reads, tokens/s", lambda v: v.number("speed", "prefill_tokens_per_second"), _plain(0), max, None,
            "not measured",
        ),
    ]  # fmt: skip


def task_columns(page: Page) -> list[Column]:
    """Accuracies of each task that was asked, by each scorer; results of other items are columns of their own."""
    asked = dict.fromkeys(
        (str(task.get("setting")), str(task.get("name")), str(scorer))
        for variant in page.rows
        for task in variant.tasks
        for scorer in task.get("scores") or ()
    )
    percent = lambda x: f"{100 * x:.1f} %"  # noqa: E731
    return [
        Column(
            f"{name}, {scorer}",
            _score_of(setting, scorer, "accuracy"), percent, max, _changes_of(setting, scorer), "not measured",
        )
        for setting, name, scorer in asked
    ]  # fmt: skip


def _score_of(setting: str, scorer: str, *path: str) -> Callable[[Variant], float | None]:
    def value(variant: Variant) -> float | None:
        found = next((task for task in variant.tasks if task.get("setting") == setting), {})
        return number_in(found, "scores", scorer, *path)

    return value


def _changes_of(setting: str, scorer: str) -> Callable[[Variant], str]:
    """The interval, and what became of the original's answers."""

    def told(variant: Variant) -> str:
        low, high, lost, won, p, kappa = (
            _score_of(setting, scorer, name)(variant)
            for name in ("interval_low", "interval_high", "lost", "won", "p", "kappa")
        )
        parts = [f"{100 * low:.1f} to {100 * high:.1f}"] if low is not None and high is not None else []
        parts += [f"{lost:.0f} lost, {won:.0f} won"] if lost is not None and won is not None else []
        parts += [f"p {p:.3f}" if p >= 0.001 else f"p {p:.1e}"] if p is not None else []
        parts += [f"κ {kappa:.3f}"] if kappa is not None else []
        return "; ".join(parts)

    return told


def table_of(page: Page, columns: Sequence[Column], rows: Sequence[Variant]) -> Table | None:
    """The columns of which anything is known; None if that is none."""
    known = [c for c in columns if any(c.value(v) is not None for v in rows)]
    if not known:
        return None
    best = [_best(c, [v for v in rows if not v.original]) for c in known]
    return Table(
        [c.title for c in known],
        [
            Row(v.name, _series(page, v), [_cell(c, v, b) for c, b in zip(known, best, strict=True)])
            for v in rows
        ],
    )  # fmt: skip


def _series(page: Page, variant: Variant) -> int | None:
    return None if variant.original else page.series(variant)


def _best(column: Column, variants: Sequence[Variant]) -> str | None:
    """The best value as it is shown, so that equal-looking ones are marked alike; None where nothing is to compare."""
    values = [value for v in variants if (value := column.value(v)) is not None]
    differ = len({column.show(value) for value in values}) > 1
    return column.show(column.best(values)) if differ and column.best else None


def _cell(column: Column, variant: Variant, best: str | None) -> Cell:
    value = column.value(variant)
    if value is None:
        return Cell(DASH if variant.original else column.absent, none=True)
    shown = column.show(value)
    extra = column.extra(variant) if column.extra else ""
    return Cell(shown, extra, shown == best and not variant.original)


def origins(page: Page) -> Table | None:
    """When, where and by what each variant was made; None where no run has a record."""
    rows = [v for v in page.variants if v.record]
    if not rows:
        return None
    return Table(
        ["Recipe", "Made from", "Finished", "featherweight", "Machine", "Ran on"],
        [Row(v.name, page.series(v), [_told(text) for text in _origin(v)]) for v in rows],
    )


def _told(text: str) -> Cell:
    return Cell(text or "not recorded", none=not text)


def _origin(variant: Variant) -> list[str]:
    processors, memory = (variant.number("record", "machine", x) for x in ("processors", "memory_bytes"))
    machine = [variant.text("machine", "processor")]
    machine += [f"{processors:.0f} processors"] if processors else []
    machine += [bytes_text(memory)] if memory else []
    machine += [variant.text("machine", "accelerator"), variant.text("machine", "system")]
    versions = [variant.text("featherweight")]
    versions += [f"torch {torch}" for torch in [variant.text("machine", "torch")] if torch]
    threads = variant.number("record", "threads")
    ran = [variant.text("device"), f"{threads:.0f} thread{'s' * (threads != 1)}" if threads else ""]
    finished = variant.text("finished").replace("T", " ").replace("+00:00", " UTC")
    joined = [", ".join(part for part in parts if part) for parts in (versions, machine, ran)]
    return [variant.text("recipe"), variant.text("source"), finished, *joined]


@dataclass(frozen=True)
class Share:
    """Layers of one role that got the same: their code, in which blocks they stand, and what they take and lose."""

    role: str
    code: str
    blocks: str
    layers: int
    weights: int
    bits: float
    error: float | None
    worst: float | None


def shares(layers: Sequence[Mapping[str, Any]]) -> list[Share]:
    """Which layer got what: one entry for each role and code, in the order of the layers."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in layers:
        role = re.sub(r"\[\d+\]|(?<=\.)\d+\.", "", str(layer.get("role") or layer.get("name") or ""))
        groups.setdefault((role, str(layer.get("code") or "")), []).append(layer)
    found = []
    for (role, code), alike in groups.items():
        if not code:
            continue
        sizes = [_weights(layer) for layer in alike]
        stored = sum(layer["nbytes"] for layer in alike if isinstance(layer.get("nbytes"), int | float))
        given = [layer.get("relative_error") for layer in alike]
        errors = [float(e) for e in given if isinstance(e, int | float) and math.isfinite(e)]
        blocks = sorted({b for layer in alike if isinstance(b := layer.get("block"), int)})
        found.append(
            Share(
                role, code, ranges(blocks) if blocks else DASH, len(alike), sum(sizes), 8 * stored / max(1, sum(sizes)),
                math.fsum(errors) / len(errors) if errors else None, max(errors) if errors else None,
            )
        )  # fmt: skip
    return found


def _weights(layer: Mapping[str, Any]) -> int:
    spec = layer.get("spec")
    shape = spec.get("shape") if isinstance(spec, Mapping) else None
    return math.prod(shape) if isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape) else 0


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
