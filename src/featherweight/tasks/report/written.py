"""`report`: the page about one's own runs, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import OutputError
from featherweight.pages.render import render
from featherweight.system.files import disk_errors
from featherweight.tasks.report.page import write_report
from featherweight.tasks.report.runs import read_runs

MARK = b'<p class="eyebrow">featherweight '
"""By which a page of ours is known."""


@dataclass(frozen=True)
class Report:
    """A page that was written to `path`. In a notebook it shows itself."""

    path: Path

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style stays in it."""
        return render("frame.html.jinja", page=self.path.read_text(encoding="utf-8"))


def report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    original: str | Path | None = None,
    title: str | None = None,
) -> Report:
    """Write a page about runs side by side: what they took, how good and how fast they are, which layer got what.

    Parameters
    ----------
    folders : str, Path or sequence of them
        What `compress` made, in the order of the page. Shown is what was recorded in them (featherweight-run.json):
        by `compress`, by `feather eval` and by `feather bench`; what was not measured is said.
    out : str or Path
        The page, one HTML file that opens offline. An earlier page of ours is replaced, nothing else.
    original : str or Path, optional
        The model that they were made from: pictures of weights then show its weights.
    title : str, optional
        Of the page. Default: the name of the model.

    Returns
    -------
    Report
        With the `path`; shows the page in a notebook.

    Raises
    ------
    CheckpointError
        A folder is not there, or is not what `compress` wrote.
    EvaluationError
        A folder is named twice, or none is named.
    OutputError
        The page cannot be written, or something else is in its place.

    Examples
    --------
    >>> featherweight.report(["small", "smaller"], "report.html", original="model")
    """
    places = [folders] if isinstance(folders, str | Path) else list(folders)
    path = Path(out).expanduser()
    claim_page(path)
    variants = read_runs(places, original)
    sources = dict.fromkeys(str(v.record["source"]) for v in variants if v.record.get("source"))
    if title is None:
        title = next(iter(sources)) if len(sources) == 1 else "Compressed models"
    return Report(write_report(path, variants, model=title))


def claim_page(out: Path) -> None:
    """OutputError before the work if a page cannot go to `out`: only a page of ours is replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_file():
        raise OutputError(f"{out} exists and is no file; name a file of its own, like report.html")
    with disk_errors(out):
        content = out.read_bytes()
    if content and MARK not in content:
        raise OutputError(f"{out} exists and is no report of ours, so it is not replaced; name another file")
