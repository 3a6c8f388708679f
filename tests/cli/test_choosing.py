"""`feather plan` without a recipe, `feather recommend` and `feather methods`: what suits, and what to type."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here

from featherweight.methods.recipe import load_recipe, presets
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.places import PACKAGE
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.compress.presets import (
    SIDE_BY_SIDE,
    Offer,
    Quality,
    Wish,
    measured,
    offers,
    qualities_of,
    recommended,
    run_memory,
)
from models import make_tiny

ROOT = PACKAGE.parent.parent


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are measured elsewhere (tests/compress): here every preset takes 75 seconds."""
    monkeypatch.setattr("featherweight.tasks.compress.presets.estimate_seconds", lambda plan: 75.0)


def test_qualities_are_those_of_the_results() -> None:
    """The file is what the script makes of docs/results.md."""
    made = runpy.run_path(str(ROOT / "scripts" / "make_quality.py"))["quality"]()
    assert made == measured(), "run scripts/make_quality.py"
    assert set(SIDE_BY_SIDE) <= presets().keys()
    assert all(qualities_of(name) for name in SIDE_BY_SIDE)
    assert [one.pretrained for one in qualities_of("trit-2")] == [True, False]
    assert qualities_of("nothing") == ()


def test_presets_side_by_side(quick: None, llama: Path, tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    done = feather_here("plan", llama, "--json", report)
    assert done.code == 0, done.errors
    found = json.loads(report.read_text())
    rows = {row["preset"]: row for row in found["presets"]}
    assert set(rows) == set(SIDE_BY_SIDE)
    with Checkpoint.open(llama) as checkpoint:
        for name in ("rtn-4", "trit-2"):
            plan = make_plan(checkpoint, load_recipe(name), 1, None)
            assert rows[name]["output_bytes"] == plan.output_bytes
            assert rows[name]["bits"] == pytest.approx(plan.inside_bits)
        cache = 2 * 2 * 2 * 128 * checkpoint.config["num_key_value_heads"] * 16  # 2 blocks, 128 tokens, heads of 16
        assert run_memory(checkpoint.config, 1000) - run_memory({}, 1000) == pytest.approx(cache, abs=1 << 22)
    for name in SIDE_BY_SIDE:
        assert name in done.output
        assert rows[name]["seconds"] == 75
    for shown in ("1 min 15 s", "fits 8 GB: all", "SmolLM2-135M-Instruct", "Other models differ", "feather recommend"):
        assert shown in " ".join(done.output.split())  # wherever its lines break
    (line,) = (line for line in done.output.splitlines() if line.startswith("trit-2 "))
    assert all(f"{one.excess:+.1f} %" in line for one in qualities_of("trit-2"))


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_the_table_fits_the_terminal(quick: None, columns: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are left out rather than cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    done = feather_here("plan", llama)
    table = done.output.partition("\n\n")[0]
    assert len(table.splitlines()) == 1 + len(SIDE_BY_SIDE)
    assert max(map(len, table.splitlines())) <= columns
    assert "…" not in table


def test_presets_that_do_not_suit_are_left_out(quick: None, tmp_path: Path) -> None:
    """A model without output layer has none to compress; where none suits, it is said why."""
    odd = make_tiny("llama", tmp_path / "odd")
    with Checkpoint.open(odd) as checkpoint:
        found = offers(checkpoint, 1, presets=("rtn-4", "trit-2"), timed=False)
    assert [offer.preset for offer in found] == ["rtn-4", "trit-2"]
    assert found[0].seconds is None


def offer(preset: str, size: int, pretrained: float | None, bundled: float | None = None, data: bool = True) -> Offer:
    measured = [("a real one", True, pretrained), ("the bundled one", False, bundled)]
    qualities = tuple(Quality(name, real, excess, 0.1) for name, real, excess in measured if excess is not None)
    return Offer(preset, data, size, 4.0, 10 * size, size + 50, None, (), qualities)


FOUND = (
    offer("large", 800, None, 0.1, data=False),
    offer("middle", 400, 5.0, 2.0),
    offer("cheap", 400, None, 3.0, data=False),
    offer("other", 350, 7.0, 1.0),
    offer("small", 300, 8.0),
    offer("elsewhere", 100, None, 9.0),
    offer("unknown", 50, None),
)
"""`other` is better than `middle` on the bundled model, but not on the real one, which counts."""


@pytest.mark.parametrize(
    ("wish", "best"),
    [
        (Wish(run_bytes=1000), "large"),
        (Wish(run_bytes=799), "middle"),
        (Wish(size_bytes=399), "other"),
        (Wish(size_bytes=200), "elsewhere"),
        (Wish(size_bytes=60), None),
        (Wish(excess=6), "middle"),
        (Wish(excess=20), "small"),
        (Wish(excess=1), "large"),
        (Wish(excess=6, size_bytes=900), "middle"),
        (Wish(run_bytes=1000, memory_bytes=4000), "middle"),
        (Wish(run_bytes=799, data_free=True), "cheap"),
    ],
)
def test_what_is_recommended(wish: Wish, best: str | None) -> None:
    found = recommended(FOUND, wish)
    assert (found.preset if found else None) == best


def test_recommendation_is_a_command(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = feather_here("recommend", llama, "--data-free", "--size", "1GB", "--json", tmp_path / "it.json")
    assert done.code == 0, done.errors
    told = json.loads((tmp_path / "it.json").read_text())
    command = shlex.split(told["command"])
    assert told["command"] in done.output
    assert command[:3] == ["feather", "compress", str(llama)]
    assert feather_here(*command[1:]).code == 0
    made = sum(path.stat().st_size for path in Path(command[-1]).glob("*.safetensors"))
    assert made == pytest.approx(told["output_bytes"], rel=0.1)
    again = feather_here("recommend", llama, "--data-free", "--size", "1GB", "--json", "-")
    assert json.loads(again.output)["command"].endswith("-2")  # the folder is there now


def test_without_a_limit_the_free_memory_counts(llama: Path) -> None:
    done = feather_here("recommend", llama)
    assert done.code == 0
    assert "note: no limit is given" in done.errors
    assert "--recipe rtn-8" in done.output


def test_what_would_do_is_named(llama: Path) -> None:
    said = feather_here("recommend", llama, "--size", "2kB").sentence()
    assert "--size" in said
    assert "would do (" in said
    said = feather_here("recommend", llama, "--quality", "0.0001").sentence()
    assert "--quality" in said


def test_methods_fit_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in (("methods",), ("methods", "trit-2")):
        assert max(len(line.rstrip()) for line in feather_here(*command).output.splitlines()) <= 80
    lines = feather_here("methods").output.splitlines()
    for name in presets():
        assert any(line.startswith(f"{name} ") for line in lines), name


def test_all_about_one_method(tmp_path: Path) -> None:
    report = tmp_path / "one.json"
    done = feather_here("methods", "gptq", "--json", report)
    row: dict[str, Any] = json.loads(report.read_text())
    assert row["preset"] == "gptq"
    for shown in ("arXiv 2210.17323", "hessian", "columns in their own order", "perplexity", "feather compress MODEL"):
        assert shown in done.output
    loud = feather_here("methods", "GPTQ")
    assert loud.output == done.output
    assert "small letters" in loud.errors
