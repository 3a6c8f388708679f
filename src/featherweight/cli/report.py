"""`feather report`: one's own runs side by side, as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from featherweight.cli.commands import out_console

MARK = b'<p class="eyebrow">featherweight '
"""By which a page of ours is known."""


def run_report(folders: Sequence[Path], out: Path, original: str | None, title: str | None) -> None:
    from featherweight.tasks.report.page import write_report
    from featherweight.tasks.report.runs import read_runs

    claim_page(out)
    variants = read_runs(folders, original)
    sources = dict.fromkeys(str(v.record["source"]) for v in variants if v.record.get("source"))
    if title is None:
        title = next(iter(sources)) if len(sources) == 1 else "Compressed models"
    write_report(out, variants, model=title)
    out_console().print(f"report: {out}", soft_wrap=True)


def claim_page(out: Path) -> None:
    """OutputError before the work if the page cannot go to `out`: only a page of ours is replaced."""
    from featherweight.errors import OutputError
    from featherweight.system.files import disk_errors

    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise OutputError(f"{out} exists and is no file; name a file of its own, like report.html")
    with disk_errors(out):
        content = out.read_bytes()
    if content and MARK not in content:
        raise OutputError(f"{out} exists and is no report of ours, so it is not replaced; name another file")
