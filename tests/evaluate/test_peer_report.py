"""Rows, table and plot of benchmarks/quality_vs_peers.py, without any peer."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks.peer_report import COMPRESSED, KEPT, PUT_BACK, Report, Row, markdown, plot, write_plots
from scripts.split_text import split

ROOT = Path(__file__).parents[2]
SETTING = {"protocol": "own", "original_perplexity": 20.0, "model": "m", "calibration": {}}


def row(tool: str = "llama.cpp", name: str = "Q4_0", seed: int | None = 0, **changes: Any) -> Row:
    facts: dict[str, Any] = {
        "version": "1",
        "bits": 4.5,
        "perplexity": 22.0,
        "excess": 0.1,
        "excess_standard_error": 0.01,
        "kl": 0.05,
        "seconds": 3.0,
        "embedding": COMPRESSED,
        "embedding_bits": 8.5,
        "file_bytes": 90_000_000,
        "top1_agreement": 0.9,
    }
    return Row(name=name, tool=tool, seed=seed, **(facts | changes))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("quality_vs_peers")


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_table_has_means_over_seeds_and_half_their_range() -> None:
    rows = [row(seed=0, excess=0.10, kl=0.05), row(seed=1, excess=0.14, kl=0.07), row(tool="hqq", name="x", seed=None)]
    table = markdown(Report(SETTING, rows))
    bits, embedding, size, _, excess, spread, kl, top, seconds, seeds = cells(table, "llama.cpp Q4_0")
    assert (bits, embedding, size, excess, spread) == ("4.500", "8.50", "90.0", "+12.00", "2.00")
    assert (kl, top, seconds, seeds) == ("0.0600", "90.0", "3", "0, 1")
    assert cells(table, "hqq x")[5] == ""


def test_a_row_with_the_original_embedding_is_a_line_of_its_own() -> None:
    rows = [row(), row(embedding=PUT_BACK, embedding_bits=16.0, file_bytes=110_000_000)]
    table = markdown(Report(SETTING, rows))
    assert cells(table, "llama.cpp Q4_0")[1:3] == ["8.50", "90.0"]
    assert cells(table, "llama.cpp Q4_0, linears only")[1:3] == ["16.00", "110.0"]


def test_cautions_and_failures_stand_below_the_table() -> None:
    report = Report(SETTING | {"four_bit_grid": True}, [row(details={"tokenizer_bytes": 1_900_000})])
    report.fail("nncf", "int4", 0, "no such mode")
    table = markdown(report)
    assert "Caution: this model's weights lie on a 4-bit grid" in table
    assert "the tokenizer, too (1.9 MB)" in table
    assert "left out: nncf int4: no such mode" in table
    assert "Caution" not in markdown(Report(SETTING, [row()]))


def test_what_a_scope_still_lacks() -> None:
    report = Report(SETTING, [row(), row(tool="hqq", name="kept", embedding=KEPT)])
    has = {scope: report.has("llama.cpp", "Q4_0", 0, scope) for scope in ("file", "linears", "both")}
    assert has == {"file": True, "linears": False, "both": False}
    assert all(report.has("hqq", "kept", 0, scope) for scope in ("file", "linears", "both"))
    assert not report.has("llama.cpp", "Q4_0", 1, "file")
    report.add(row(embedding=PUT_BACK))
    assert report.has("llama.cpp", "Q4_0", 0, "both")


def test_a_row_replaces_its_like_and_its_failure() -> None:
    report = Report(SETTING)
    report.fail("llama.cpp", "Q4_0", 0, "first try")
    report.add(row(kl=0.5))
    report.add(row(kl=0.4))
    assert [r.kl for r in report.rows] == [0.4]
    assert report.failures == []


def test_json_and_back(tmp_path: Path) -> None:
    report = Report(SETTING, [row(note="Q4_0 100%")])
    report.fail("nncf", "int4", None, "why")
    report.write(tmp_path / "new" / "peers.json")
    assert Report.read(tmp_path / "new" / "peers.json") == report


def test_rows_of_an_older_file_have_no_size(tmp_path: Path) -> None:
    old = {"name": "a", "tool": "hqq", "version": "1", "bits": 4.0, "perplexity": 21.0, "excess": 0.05, "kl": 0.1}
    old |= {"excess_standard_error": None, "seconds": 1.0, "seed": None, "note": "", "details": {}}
    (tmp_path / "old.json").write_text(json.dumps({**SETTING, "rows": [old]}))
    table = markdown(Report.read(tmp_path / "old.json"))
    assert cells(table, "hqq a")[:3] == ["4.000", "", ""]


def test_the_plot_is_whole_and_knows_its_colours(tmp_path: Path) -> None:
    rows = [row(name=f"Q{i}", bits=3.0 + i / 5, kl=0.5 / (i + 1), excess=0.5 / (i + 1)) for i in range(6)]
    rows += [row(tool="featherweight", name="trit-2", bits=3.45, file_bytes=68_000_000), row(name="none", excess=-0.01)]
    report = Report(SETTING, rows)
    for path in write_plots(report, tmp_path / "img" / "peers.svg"):
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
        assert "prefers-color-scheme: dark" in text
        words = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert words.count("trit-2") == 4  # in each panel
        assert {"excess perplexity, %", "KL from the original", "MB, whole file"} <= set(words)
    widths = [float(re.search(r'width="([\d.]+)"', plot(report, columns))[1]) for columns in (2, 1)]  # type: ignore[index]
    assert widths[1] < 420 < widths[0]


def test_against_bits_stands_the_row_with_the_original_embedding() -> None:
    rows = [row(kl=0.3, excess=0.3), row(embedding=PUT_BACK, kl=0.1, excess=0.1), row(name="other", bits=3.0)]
    one, both = (plot(Report(SETTING, chosen)) for chosen in (rows[::2], rows))
    assert one.count(">Q4_0<") == both.count(">Q4_0<")
    assert one != both


def test_split_at_a_line_end() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    first, rest = split(text, 0.7)
    assert first + rest == text
    assert first.endswith("\n")
    assert 0.7 * len(text) <= len(first) <= 0.7 * len(text) + len("line 99\n")
    with pytest.raises(ValueError, match="no line end"):
        split("no line end at all", 0.5)


def test_recipes_with_options_and_without(bench: Any) -> None:
    assert bench.recipe_words("gptq,trit-2") == [["gptq"], ["trit-2"]]
    assert bench.recipe_words("gptq --set embedding=6bit") == [["gptq", "--set", "embedding=6bit"]]


def test_levels_of_a_four_bit_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peer_original = importlib.import_module("peer_original")
    scales = torch.rand(8, 4, 1) + 0.5
    grid = (torch.arange(32) % 16 - 8) * scales
    assert peer_original.levels(grid.reshape(8, 128)) == 16
    assert peer_original.levels(torch.randn(8, 128)) > 16
