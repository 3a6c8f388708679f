"""`fit`: within the budget to the byte, better than one way everywhere, the same again after any stop."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import featherweight
from featherweight.errors import FeatherError, OutputError, RecipeError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.fit.choosing import Pool, pools_of
from featherweight.tasks.fit.fitting import RESULT
from featherweight.tasks.fit.settings import FitSettings
from models import make_tiny
from outputs import in_process, start

QUICK = FitSettings(ways=("1 plane", "3 bits", "5 bits"), windows=8, length=64, tokens=128, score=256)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("fit") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(draw.choice(["once", "upon", "a", "time", "there", "was", "rain"]) for _ in range(4000)))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is measured of the model, for all tests."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def fit(
    model: Path, text: Path, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., featherweight.Fit]:
    place = tmp_path_factory.mktemp("made")

    def run(
        budget: int | None, out: str = "out", settings: FitSettings = QUICK, **options: object
    ) -> featherweight.Fit:
        return featherweight.fit(
            model, place / out, budget, settings=settings, calibration=text, text=text, work=work, **options
        )  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def made(fit: Callable[..., featherweight.Fit]) -> list[featherweight.Fit]:
    """Three models of different sizes."""
    return [fit(budget, f"out-{budget}") for budget in (45_000, 52_000, 62_000)]


def test_results_are_models_within_their_budgets(made: list[featherweight.Fit]) -> None:
    for result in made:
        out = result.out
        assert result.budget is not None
        assert result.bytes == size_of(out) <= result.budget
        assert verify(out).whole
        assert json.loads((out / RESULT).read_text())["bytes"] == result.bytes
        assert {layer.name for layer in result.layers} >= {"model.layers.0.self_attn.q_proj", "model.embed_tokens"}
        (own,) = [point for point in result.front if point.chosen]
        assert (own.bytes, own.kl) == (result.bytes, result.kl)
        kls = [point.kl for point in result.front]
        assert kls == sorted(kls, reverse=True)
        assert [point.bytes for point in result.front] == sorted(point.bytes for point in result.front)
    assert featherweight.load(made[0].out)[0](torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 256)


def test_more_bytes_are_less_divergence(made: list[featherweight.Fit]) -> None:
    first, second, third = (result.kl or 0.0 for result in made)
    assert first > second > third > 0
    for result in made:
        assert result.assembled_kl is not None
        assert result.assembled_kl <= (result.unrefined_kl or 0)
        assert result.uniform_kl is not None


def test_no_budget_is_exceeded_and_little_is_left(fit, model: Path, text: Path, work: Path) -> None:  # type: ignore[no-untyped-def]
    """Two hundred budgets: the choices' exact bytes; the few that are made have them on disk."""
    from featherweight.tasks.fit import fitting
    from featherweight.tasks.fit.study import Study

    with Checkpoint.open(model) as checkpoint:
        base = fitting._base(checkpoint, QUICK)
        plan = fitting.make_plan(checkpoint, base)
        windows = fitting._windows(checkpoint, base, text, model, lambda event: None)
        folder = fitting._folder(work, checkpoint, windows, QUICK)
        study = Study(model, checkpoint, plan, QUICK, windows, text, folder, lambda event: None)
        problem = study.measured()
        draw = random.Random(1)
        ends = [
            {name: f(range(len(w)), key=lambda i, w=w: w[i].nbytes) for name, w in problem.measured.items()}
            for f in (min, max)
        ]
        least, most = (study.file_bytes(problem, chosen) for chosen in ends)
        steps = max(w[-1].nbytes - w[0].nbytes for w in problem.measured.values())
        for _ in range(200):
            budget = draw.randint(least, most)
            room = study.code_budget(problem, budget)
            chosen = problem.solved(room)
            size = study.file_bytes(problem, chosen)
            assert budget - steps < size <= budget


def test_a_second_fit_measures_nothing_again(fit, made, work: Path) -> None:  # type: ignore[no-untyped-def]
    (folder,) = [path.with_name("measured") for path in work.glob("*/statistics.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    fit(56_000, "other")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def fit_quickly(model: Path, text: Path, out: Path, work: Path) -> None:
    featherweight.fit(model, out, 54_000, calibration=text, text=text, work=work, threads=1, settings=QUICK)


def test_killed_it_goes_on_to_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert in_process(fit_quickly, model, text, tmp_path / "whole", tmp_path / "work-0") == 0
    took = time.monotonic() - begun
    cut = (model, text, tmp_path / "cut", tmp_path / "work-1")
    draw = random.Random(0)
    for _ in range(2):
        process = start(fit_quickly, *cut)
        process.join((0.2 + 0.4 * draw.random()) * took)
        process.kill()
        process.join()
    assert in_process(fit_quickly, *cut) == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_layers_that_go_together_go_one_way(fit) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    found = {
        layer.name: layer.choice for layer in fit(54_000, "alike", settings=replace(QUICK, alike=True, score=0)).layers
    }
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({found[f"{attention}.{x}_proj"] for x in "qkv"}) == 1
        assert found[f"{mlp}.gate_proj"] == found[f"{mlp}.up_proj"]


def test_pools_are_kept_each(fit) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    pools = (Pool("mlp", 12_000), Pool("rest", 30_000))
    result = fit(None, "pools", settings=replace(QUICK, pools=pools, score=0))
    mlp = sum(layer.bytes for layer in result.layers if ".mlp." in layer.name)
    assert 0.8 * 12_000 < mlp <= 12_000
    assert sum(layer.bytes for layer in result.layers if ".mlp." not in layer.name) <= 30_000


def test_without_text_layers_count_by_their_weights(fit) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    result = fit(54_000, "data-free", settings=replace(QUICK, data_free=True, score=0))
    assert result.kl is None
    assert result.predicted_kl is None
    assert result.bytes <= 54_000
    assert result.recipe["rounding"] == {"kind": "nearest"}


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "bert"])
def test_other_families(family: str, text: Path, tmp_path: Path) -> None:
    model = make_tiny(family, tmp_path / "model", tokenizer=True)
    whole = size_of(model)
    settings = FitSettings(ways=("3 bits", "4 bits"), windows=8, length=32, tokens=64, refine=1, score=0)
    result = featherweight.fit(
        model, tmp_path / "out", 2 * whole // 5, settings=settings, calibration=text, work=tmp_path / "work"
    )
    assert size_of(tmp_path / "out") == result.bytes <= 2 * whole // 5
    assert verify(tmp_path / "out").whole


def test_what_cannot_be_met_is_one_sentence(fit, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        FeatherError, match=r"the budget is 10 kB, and the smallest that these choices make .* is \d+(\.\d)? kB"
    ):
        fit(10_000)
    with pytest.raises(FeatherError, match=r"the budget is 9 MB, more than the original's"):
        fit(9_000_000)
    with pytest.raises(FeatherError, match="a budget for the whole model, or pools"):
        fit(None)
    with pytest.raises(RecipeError, match=r"no choice '3 bit' \(did you mean '3 bits'\?\)"):
        fit(52_000, settings=FitSettings(ways=("3 bit",)))
    with pytest.raises(RecipeError, match="the preset awq cannot be a choice for single layers"):
        fit(52_000, settings=FitSettings(ways=("awq",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        featherweight.fit(model, tmp_path / "full", 52_000, settings=QUICK)
    with pytest.raises(FeatherError, match="belongs to no pool of --budget: add rest=SIZE"):
        fit(None, settings=FitSettings(ways=QUICK.ways, windows=8, length=64, tokens=128, pools=(Pool("mlp", 20_000),)))


def test_pools_are_read() -> None:
    assert pools_of("experts=12GB, rest=6GB") == (Pool("experts", 12 * 10**9), Pool("rest", 6 * 10**9))
    for wrong in ("experts", "experts=", "=3GB", "a=3GB,b"):
        with pytest.raises(FeatherError):
            pools_of(wrong)
