"""`feather report`: one's own runs side by side, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featherweight.cli.console import claim_json, say, write_json


def run_report(folders: Sequence[Path], out: Path, original: str | None, title: str | None, json: Path | None) -> None:
    """The page, and as JSON what the folders record."""
    from featherweight.storage.run.record import read_record
    from featherweight.tasks.report.written import report

    claim_json(json, ("report", "runs"))
    made = report(folders, out, original=original, title=title)
    runs = [{"folder": str(folder), "record": read_record(folder)} for folder in folders]
    write_json(json, {"report": str(made.path), "runs": runs})
    say(f"report: {made.path}")
