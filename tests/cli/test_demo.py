"""The demo, with fewer recipes and tokens: what it leaves behind, and what it will not touch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featherweight.cli import demo
from featherweight.errors import OutputError


@pytest.mark.slow
def test_it_compresses_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "RECIPES", ("rtn-4", "ptqtp"))
    monkeypatch.setattr(demo, "HEALED", "ptqtp")
    monkeypatch.setattr(demo, "HEAL", {**demo.HEAL, "steps": 2, "windows": 16, "length": 64})
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 8)
    fit = {"ways": ("3 bits", "4 bits"), "windows": 2, "length": 128, "tokens": 128, "refine": 0}
    monkeypatch.setattr(demo, "FIT", fit)
    out = tmp_path / "out"
    for _ in range(2):  # again over its own output
        demo.run_demo(out, 2100, None)
    results = json.loads((out / demo.RESULTS).read_text())
    assert list(results) == ["original", "rtn-4", "ptqtp", "fit, 3 MB", "ptqtp, healed"]
    assert results["fit, 3 MB"]["evaluation"]["bytes"] <= demo.FIT_BYTES
    assert "made" in (out / "fit.html").read_text()
    losses = {name: run["evaluation"]["perplexity"] for name, run in results.items()}
    assert losses["original"] < losses["rtn-4"] < losses["ptqtp"]
    shown = capsys.readouterr().out
    for name, perplexity in losses.items():
        assert f"{perplexity:.3f}" in shown
        assert f"{name}: {demo.PROMPT}" in shown
    page = (out / "report.html").read_text()
    assert page.count(demo.PROMPT) >= 3
    assert "protocol own" in page


def test_it_leaves_another_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="not the output of a demo"):
        demo.run_demo(tmp_path, 2100, None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", ["", "[1]", '{"mine": 1}', '{"a": {"evaluation": 1}}'])
def test_a_file_of_the_same_name_is_not_its_results(tmp_path: Path, content: str) -> None:
    (tmp_path / demo.RESULTS).write_text(content)
    with pytest.raises(OutputError, match="not the output of a demo"):
        demo.run_demo(tmp_path, 2100, None)
    assert (tmp_path / demo.RESULTS).read_text() == content


def test_a_folder_of_ones_own_in_a_demo_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RECIPES", ("rtn-4",))
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 1)
    (tmp_path / demo.RESULTS).write_text("{}")
    (tmp_path / "rtn-4").mkdir()
    (tmp_path / "rtn-4" / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match=r"holds mine\.txt, which featherweight did not write"):
        demo.run_demo(tmp_path, 100, 1)
    assert (tmp_path / "rtn-4" / "mine.txt").read_text() == "kept"
