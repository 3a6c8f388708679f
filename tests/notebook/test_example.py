"""The example notebook runs, and shows progress and results; progress without IPython's kernel stays away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from featherweight.pages import notebook
from featherweight.pages.notebook import NotebookProgress, in_notebook

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "compress_and_compare.ipynb"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    example = nbformat.read(EXAMPLE, as_version=4)
    assert all(not cell.get("outputs") for cell in example.cells), "outputs are not kept in the repository"
    NotebookClient(example, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown: list[list[str]] = [
        [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]
        for cell in example.cells
        if cell.cell_type == "code"
    ]
    progress, result = shown[1]
    assert "<progress" in progress
    assert "done in" in progress
    assert "rtn-4" in result
    assert any("KL divergence" in html for html in shown[3])
    assert "iframe" in shown[-1][-1]


def test_outside_a_notebook_nothing_is_shown() -> None:
    assert not in_notebook()
    assert notebook.progress_here("x") is None


def test_progress_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    class Handle:
        def update(self, page: Any) -> None:
            pages.append(page.data)

    monkeypatch.setattr("IPython.display.display", lambda page, display_id: Handle())
    monkeypatch.setattr(notebook, "SECONDS", 0)
    shown = NotebookProgress("compressing")
    layer = {"event": "layer", "number": 3, "of": 9, "name": "a.<b>", "relative_error": 0.1}
    shown({**layer, "seconds_left": 75.0})
    assert "layer 3 of 9, a.&lt;b&gt;, error 0.1000, 1:15 left" in pages[-1]
    shown({"event": "scale-tuning", "step": 5, "of": 40, "run_seconds_left": 3700.0})
    assert "scale-tuning 5 of 40, 1:01:40 left" in pages[-1]
    shown({"event": "note", "text": "short <text>"})
    assert "note: short &lt;text&gt;" in pages[-1]
    shown({"event": "done", "seconds": 12.0})
    assert 'value="1.0000"' in pages[-1]
    shown.count(1, 4)
    shown.count(4, 4)
    assert "window 4 of 4" in pages[-1]
