"""`feather import`: what another tool has written, as a folder."""

from __future__ import annotations

from pathlib import Path

from featherweight.cli.console import claim_json, facts, note, out_console, steps, write_json
from featherweight.system.units import size_text

MEGABYTE = 1_000_000


def run_import(model: str, out: Path, json: Path | None) -> None:
    """Import, and say what became of how many tensors."""
    from featherweight.interop.importing import import_model

    claim_json(json, ("out", "origin", "coded"))
    with steps("importing, MB") as told:
        made = import_model(model, out, told=lambda done, total: told(done // MEGABYTE, total // MEGABYTE))
    write_json(json, {**vars(made), "out": str(made.out)})
    for text in made.notes:
        note(text)
    rows = [
        ("output", str(made.out)),
        ("imported from", made.origin),
        ("tensors", f"{made.coded} as codes, {made.plain} plain"),
        ("size", size_text(made.bytes)),
    ]
    out_console().print(facts(rows))
