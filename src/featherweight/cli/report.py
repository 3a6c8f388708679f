"""`feather report`: one's own runs side by side, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featherweight.cli.commands import out_console


def run_report(folders: Sequence[Path], out: Path, original: str | None, title: str | None) -> None:
    from featherweight.tasks.report.written import report

    made = report(folders, out, original=original, title=title)
    out_console().print(f"report: {made.path}", soft_wrap=True)
