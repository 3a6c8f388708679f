"""One's own runs in a report: what is recorded in their folders, and what is said where nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.cli.report import run_report
from featherweight.errors import CheckpointError, EvaluationError, OutputError
from featherweight.storage.codes.hadamard import Hadamard, rotate
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.uniform import Uniform
from featherweight.storage.run.ownership import RECORD
from featherweight.storage.run.record import add_measurement, read_record
from featherweight.tasks.analyse.levels import histogram_of, pictures_of
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.report.runs import names_of, read_runs
from featherweight.tasks.report.tables import ranges, shares
from models import make_tiny

SETTING = {"protocol": "own", "context": 64, "stride": 64, "text_sha256": "a", "text_tokens": 640, "dtype": "float32"}


def measured(perplexity: float, **others: Any) -> dict[str, Any]:
    known = {"perplexity": perplexity, "perplexity_against": 200.0, "kl": 0.1, "against": "model", "date": "2026-01-01"}
    return {**SETTING, **known, "bits_per_weight": {"linear": 3.1, "model": 5.0}, "bytes": 1000, **others}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, a, b): two compressions of one model, the second rotated."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny("llama", folder / "model", tokenizer=True)
    small = ["grid.group_size=32"]
    compress(model, "rtn-4", folder / "a", changes=small, threads=1)
    rotated = [*small, "transforms=[{kind: hadamard, block: 32}]"]
    compress(model, "rtn-3", folder / "b", changes=rotated, threads=1)
    return model, folder / "a", folder / "b"


def test_a_compression_is_recorded(runs: tuple[Path, Path, Path]) -> None:
    model, a, _ = runs
    found = read_record(a)["compression"]
    assert found["source"] == model.name
    assert str(model.parent) not in (a / RECORD).read_text()
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] >= found["resident_at_start_bytes"] > 0
    assert found["first_begun"] <= found["finished"]
    assert (found["recipe"], found["threads"], found["device"], found["resumed"]) == ("rtn-4", 1, "cpu", 0)
    assert found["machine"]["processors"] >= 1


def test_runs_side_by_side(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, a, b = runs
    assert add_measurement(a, "evaluations", measured(210.0))
    assert add_measurement(a, "evaluations", measured(205.0))  # the same setting again: the new one counts
    assert len(read_record(a)["evaluations"]) == 1
    original, first, second = read_runs([a, b], model)
    assert (original.name, original.perplexity, first.perplexity) == ("original", 200.0, 205.0)
    assert second.perplexity is None
    assert any("feather eval" in text for text in second.missing)
    assert any("feather bench" in text for text in first.missing)
    page = tmp_path / "page.html"
    run_report([a, b], page, str(model), None, None)
    text = page.read_text()
    for part in ("205.0", "+2.50", "not measured", "rotated", "q_proj", "0, 1", f"<h1>{model.name}</h1>"):
        assert part in text, part
    run_report([a], page, None, "Mine", None)  # over a page of ours
    assert "<h1>Mine</h1>" in page.read_text()
    assert "as stored" in page.read_text()


def test_a_run_measured_otherwise_is_not_compared(runs: tuple[Path, Path, Path]) -> None:
    _, a, b = runs
    for folder in (a, b):
        (folder / RECORD).write_text(json.dumps({"layout": 1, "compression": {}, "evaluations": [], "speeds": []}))
    add_measurement(a, "evaluations", measured(205.0))
    add_measurement(b, "evaluations", measured(50.0, text_sha256="another", date="2025-01-01"))
    found = {variant.name: variant for variant in read_runs([a, b])}
    assert found["a"].perplexity == 205.0
    assert found["b"].perplexity is None
    assert any("another protocol" in text for text in found["b"].missing)
    assert any("not recorded" in text for text in found["b"].missing)


def test_what_is_no_run_is_one_sentence(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, a, _ = runs
    with pytest.raises(CheckpointError, match=r"has no featherweight\.json"):
        read_runs([model])
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(EvaluationError, match="named twice"):
        read_runs([a, a.parent / "." / "a"])
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="no report of ours"):
        run_report([a], mine, None, None, None)
    assert mine.read_text() == "<p>mine</p>"
    assert not add_measurement(model, "evaluations", measured(1.0))
    assert not (model / RECORD).exists()


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/one/out"), Path("/x/two/out")]) == ["one/out", "two/out"]


def test_layers_that_got_the_same_are_one_row() -> None:
    def layer(block: int, code: str, error: float) -> dict[str, Any]:
        spec = {"shape": [10, 20]}
        return {"role": "q_proj", "block": block, "code": code, "nbytes": 100, "relative_error": error, "spec": spec}

    first, second = shares([layer(0, "a", 0.1), layer(1, "b", 0.5), layer(2, "a", 0.3), layer(3, "a", 0.2)])
    assert (first.code, first.blocks, first.layers, first.weights, first.bits) == ("a", "0, 2, 3", 3, 600, 4.0)
    assert (first.error, first.worst) == (pytest.approx(0.2), 0.3)
    assert second.blocks == "1"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"


def test_levels_of_a_rotated_layer_are_those_of_its_grid() -> None:
    weight = torch.randn(6, 64)
    codes = torch.randint(8, (6, 64), dtype=torch.int32)
    inner = Uniform.encode(codes, torch.rand(6, 2), torch.full((6, 2), 3), 3, 32)
    data = histogram_of(weight, Hadamard(inner, 64, 5), "layer")
    assert data["basis"] == "rotated"
    row, group = data["row"], data["first_column"] // 32
    assert data["levels"] == inner.group_levels(row, group)
    first = data["first_column"]
    assert data["weights"] == rotate(weight, 64, 5)[row, first : first + 32].tolist()
    order = torch.randperm(64)
    both = histogram_of(weight, Hadamard(Permuted.encode(inner, order), 64, 5))
    assert both["basis"] == "rotated, columns reordered"
    assert len(both["levels"]) <= 8


@pytest.mark.parametrize("name", ["a", "b"])
def test_pictures_are_never_blank(runs: tuple[Path, Path, Path], name: str) -> None:
    model, *folders = runs
    folder = next(f for f in folders if f.name == name)
    for original in (model, None):
        pictures = pictures_of(folder, original, ("q_proj", "down_proj"))
        assert [p["layer"].rpartition(".")[2] for p in pictures] == ["q_proj", "down_proj"]
        for picture in pictures:
            assert 1 < len(picture["levels"]) <= 16
            assert (picture["relative_error"] is None) == (original is None)
