"""`feather methods`: the presets, a line each; all about one; or all of them on all axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, facts, note, out_console, say, write_json

FULL = ("preset", "transform", "grid", "rounding", "correction", "allocation", "needs", "bits", "cost", "paper")
MARKS = ("preset", "grid", "bits")
"""Keys by which an earlier JSON of this command is known."""


def run_methods(name: str | None, full: bool, json: Path | None) -> None:
    from featherweight.tasks.compress.methods import method_table

    claim_json(json, MARKS)
    rows = method_table()
    if name is not None:
        row = _named(name, rows)
        write_json(json, row)
        _show_one(row)
        return
    write_json(json, rows)
    (_show_axes if full else _show_short)(rows)


def _named(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a preset; of one in other letters, too, which is said."""
    from featherweight.errors import RecipeError
    from featherweight.registry import nearest

    found = {row["preset"]: row for row in rows}
    if name not in found and name.lower() in found:
        note(f"presets are written in small letters: {name.lower()}")
        name = name.lower()
    if name not in found:
        raise RecipeError(
            f"there is no preset called {name!r}{nearest(name, found)}; feather methods lists all {len(found)}"
        )
    return found[name]


def _show_short(rows: list[dict[str, Any]]) -> None:
    """A line each, by bits."""
    from featherweight.plugins import OURS

    width = out_console().width
    name = max(len(row["preset"]) for row in rows)
    origin = max(len(row["from"]) for row in rows) + 2 if any(row["from"] != OURS for row in rows) else 0
    head = f"{'preset':{name}}  {'from'[:origin]:{origin}}{'bits':>5}  {'needs':7}  {'holds':6}  what it is"
    say(head[:width].rstrip())
    for row in sorted(rows, key=lambda row: (-row["bits"], row["preset"])):
        needs = "no data" if row["needs"] == "no data" else "text"
        line = f"{row['preset']:{name}}  {row['from'][:origin]:{origin}}{row['bits']:5.2f}  {needs:7}  "
        line += f"{row['memory']:6}  {row['title']}"
        say(line if len(line) <= width else line[: width - 3] + "...")
    _added()
    say()
    for line in (
        "holds: what is in memory at once",
        "feather methods NAME: all about one; feather methods --full: all on all axes",
    ):
        out_console().print(line)


def _show_one(row: dict[str, Any]) -> None:
    import textwrap

    from featherweight.tasks.compress.methods import cost_text
    from featherweight.tasks.compress.presets import measured

    rows = [
        ("preset", row["preset"]),
        ("title", row["title"]),
        ("paper", row["paper"]),
        ("from", row["from"]),
        ("bits per weight", f"{row['bits']:.3f}, of a matrix of 4096 x 4096"),
        *((axis, row[axis]) for axis in ("transform", "grid", "rounding", "correction", "allocation")),
        ("embedding, head", row["outside"]),
        ("needs", row["needs"]),
        ("cost", cost_text(row)),
    ]
    models = measured()["models"]
    for key, found in measured()["presets"].get(row["preset"], {}).items():
        changes = f" with {found['changes']}" if found["changes"] else ""
        text = f"{found['excess']:+.2f} % perplexity, KL {found['kl']:.4f}, on {models[key]['name']}{changes}"
        rows.append(("measured", text))
    out_console().print(facts([(name, value) for name, value in rows if value]))
    if row["notes"]:
        say()
        for line in textwrap.wrap(row["notes"], min(out_console().width, 100)):
            say(line)
    say(f"\nfeather compress MODEL --recipe {row['preset']} --out DIR")


def _show_axes(rows: list[dict[str, Any]]) -> None:
    """Presets as points in the recipe space."""
    from rich.table import Table

    from featherweight.plugins import OURS
    from featherweight.tasks.compress.methods import cost_text

    table = Table(box=None, pad_edge=False)
    names = list(FULL)
    if any(row["from"] != OURS for row in rows):
        names.insert(1, "from")
    for name in names:
        whole = name in ("preset", "from", "bits")  # is never broken
        table.add_column(name, justify="right" if name == "bits" else "left", no_wrap=whole)
    for row in rows:
        table.add_row(*(cost_text(row) if name == "cost" else str(row[name]) for name in names))
    out_console().print(table)
    _added()


def _added() -> None:
    """Choices of other packages, which recipes can name."""
    from featherweight.tasks.compress.methods import added_choices

    if added := added_choices():
        say("\nchoices from other packages")
        out_console().print(facts([(f"{row['axis']} {row['name']}", row["from"]) for row in added]))
