"""What a fit may be held to beside bytes: speed, targets, processes; other measures and solvers; that sums predict."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight.errors import FeatherError
from featherweight.interop.stored import StoredModel
from featherweight.methods.budget.knapsack import Option, solve
from featherweight.registry import find, registered
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.fit import fitting, rates
from featherweight.tasks.fit.checking import fitted
from featherweight.tasks.fit.greedy import greedy
from featherweight.tasks.fit.measures.fidelity import subset_fidelity
from featherweight.tasks.fit.settings import FitSettings
from featherweight.tasks.fit.study import Study
from featherweight.tasks.fit.targets import shareable
from featherweight.tasks.fit.ways import own_ways
from models import make_tiny

QUICK = FitSettings(ways=("1 plane", "3 bits", "5 bits"), windows=8, length=64, tokens=128, score=0, refine=0, checks=0)
G = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, and what is measured of them."""
    found, draw = tmp_path_factory.mktemp("limits"), random.Random(0)
    make_tiny("llama", found / "model", tokenizer=True)
    words = ["once", "upon", "a", "time", "there", "was", "rain"]
    (found / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(4000)))
    return found


NOISE = 1e-7
"""Of a divergence in float32, which is the difference of logarithms some 1e7 times as large."""


@pytest.fixture
def study(place: Path) -> Any:
    with Checkpoint.open(place / "model") as checkpoint:
        yield study_of(place, checkpoint, QUICK)


def study_of(place: Path, checkpoint: Checkpoint, settings: FitSettings) -> Study:
    base = fitting._base(checkpoint, settings)
    text = place / "text.txt"
    windows = fitting._windows(checkpoint, base, text, place, lambda event: None)
    folder = fitting._folder(place / "work", checkpoint, windows, settings)
    plan = fitting.make_plan(checkpoint, base)
    return Study(place / "model", checkpoint, plan, settings, windows, text, folder, lambda event: None)


def test_passes_from_a_block_are_those_of_the_whole(study: Study) -> None:
    study.curves.measure(study.ways, lambda done, total: None)
    with study.network() as network:
        assert network is not None
        assert network.from_block
        before = network.passes
        for layer in study.layers:
            weights = {layer.name: study.curves.code(study.curves.measured[layer.name][0]).decode()}
            first = network.first_block([layer])
            assert first == (layer.block or 0)
            whole, part = network.divergence(weights), network.divergence(weights, first)
            assert part == pytest.approx(whole, rel=1e-3, abs=NOISE)
            assert whole > NOISE or layer.name.endswith(("q_proj", "k_proj")), layer.name  # random scores hardly matter
        assert network.passes - before == pytest.approx(
            sum(2 - (layer.block or 0) / study.plan.anatomy.blocks for layer in study.layers)
        )
        assert network.divergence({}) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(registered("sensitivity")))
def test_every_measure_weighs_every_layer(name: str, place: Path) -> None:
    with Checkpoint.open(place / "model") as checkpoint:
        problem = study_of(place, checkpoint, replace(QUICK, sensitivity=name)).measured()
        small = ("q_proj", "k_proj") if name == "kl" else ()  # random scores hardly matter: 0 within float32
        assert all(problem.worth[n] > 0 or (n.endswith(small) and problem.worth[n] == 0) for n in problem.measured)
        assert len(set(problem.worth.values())) > 1


def test_sums_predict_divergences(place: Path) -> None:
    with Checkpoint.open(place / "model") as checkpoint:
        study = study_of(place, checkpoint, replace(QUICK, checks=8))
        found = study.check(study.measured())
        assert found is not None
        assert found.r2 > 0.8
        assert found.relative_error < 0.5
        assert found.interaction == pytest.approx(1, abs=0.3)
        assert len(found.points) == 8
        again = study.check(study.measured())
        assert again == found


def test_the_check_knows_good_from_bad() -> None:
    line = [(x, 3 * x) for x in (1.0, 2.0, 4.0, 8.0)]
    found = fitted(line)
    assert found is not None
    assert (found.scale, found.r2, found.relative_error) == pytest.approx((3, 1, 0))
    bad = fitted([(1.0, 1.0), (1.0, 9.0), (1.0, 1.0), (9.0, 1.0)])
    assert bad is not None
    assert bad.r2 < 0
    assert fitted(line[:3]) is None


def test_a_floor_on_speed_is_kept(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are given, so that the fast way is not the small one."""
    monkeypatch.setattr(rates, "_rate", lambda curves, users: {"1 plane": 1e5}.get(users[0][1].way.name, 1e6))
    monkeypatch.setattr(rates, "_machine", lambda: "test")
    study.settings = replace(study.settings, tokens_per_second=1.0)
    problem = study.measured()
    room = problem.least() * 3 // 2
    free = problem.solved(room)
    rate = 1 / problem.taken_seconds(free)
    held = replace(problem, most_seconds=1 / (1.2 * rate))
    chosen = held.solved(room)
    assert held.taken_seconds(chosen) <= held.most_seconds
    assert held.nbytes(chosen) <= room
    assert held.cost(chosen) >= problem.cost(free)
    with pytest.raises(FeatherError, match=r"--tokens-per-second 1e\+09 cannot be met .* the fastest .* \d+"):
        replace(problem, most_seconds=1e-9).solved(room)


def test_rates_are_measured_once(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    study.curves.measure(study.ways, lambda done, total: None)
    one = rates.layer_seconds(study.curves, study.layers, lambda layer: True, lambda done, total: None)
    assert all(value > 0 for found in one.values() for value in found)

    def refused(*args: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(rates, "_rate", refused)
    assert rates.layer_seconds(study.curves, study.layers, lambda layer: True, lambda done, total: None) == one


def test_processes_share_whole_groups(study: Study) -> None:
    layers = {layer.name.rpartition(".")[2]: layer for layer in study.layers if layer.block == 0}
    ways = own_ways()
    assert shareable(replace(layers["down_proj"], shape=(64, 512)), ways, 4) == ways  # rotations and groups of 128
    planes = tuple(replace(way, transforms=()) for way in ways)
    left = shareable(replace(layers["down_proj"], shape=(64, 192)), planes, 2)  # 96 inputs: groups of 32, not of 128
    assert [way.name for way in left] == ["1 plane", "2 planes", "3 planes"]
    with pytest.raises(FeatherError, match="no choice cuts the 192 inputs"):
        shareable(replace(layers["down_proj"], shape=(64, 192)), ways, 2)
    with pytest.raises(FeatherError, match="the 64 outputs of .*q_proj cannot be shared so"):
        shareable(layers["q_proj"], ways, 3)


def test_vllm_reads_what_is_made_for_it(place: Path) -> None:
    settings = replace(QUICK, ways=(), target="vllm")
    whole = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors"))
    out = place / "vllm"
    made = featherweight.fit(
        place / "model", out, whole * 13 // 20, settings=settings, calibration=place / "text.txt", work=place / "work"
    )
    assert {layer.choice for layer in made.layers} == {"4 bits, groups of 32"}  # of 64 inputs
    with StoredModel(out) as stored:
        answer = find("target", "vllm").ask(stored)
    assert answer.runs
    assert "compressed-tensors" in answer.how
    with pytest.raises(FeatherError, match="vLLM's own kernels do not read '1 plane'"):
        featherweight.fit(place / "model", place / "no", whole, settings=replace(QUICK, target="vllm"))


def test_greedy_stays_within_and_is_no_better() -> None:
    draw = random.Random(0)
    for _ in range(50):
        items = [[Option(draw.randint(1, 20), draw.random()) for _ in range(4)] for _ in range(6)]
        budget = sum(min(o.nbytes for o in item) for item in items) + draw.randint(0, 40)
        taken = [item[place] for item, place in zip(items, greedy(items, budget), strict=True)]
        assert sum(option.nbytes for option in taken) <= budget
        assert sum(option.cost for option in taken) >= solve(items, budget).cost - 1e-9
    with pytest.raises(ValueError, match="smallest options"):
        greedy([[Option(5, 1.0)]], 4)


def test_subset_fidelity_is_least_squares() -> None:
    x, w = torch.randn(400, 6, generator=G).double(), torch.randn(3, 6, generator=G).double()
    gram, y = x.T @ x / 400, x @ w.T
    kept = (w.square().sum(0) * gram.diagonal()).argsort(descending=True)[:3]
    best = torch.linalg.lstsq(x[:, kept], y).solution
    share = 1 - float((y - x[:, kept] @ best).square().sum() / y.square().sum())
    assert subset_fidelity(w, gram, 3) == pytest.approx(share, abs=1e-3)
    values = [subset_fidelity(w, gram, count) for count in range(1, 7)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1, abs=1e-3)


def test_an_unknown_measure_is_said_before_anything(place: Path) -> None:
    with pytest.raises(FeatherError, match="'klx'.*did you mean 'kl'"):
        featherweight.fit(place / "model", place / "no", 50_000, settings=replace(QUICK, sensitivity="klx"))
