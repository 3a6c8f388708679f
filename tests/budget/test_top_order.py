"""Orders of blocks: the scores on what is known, and the allocations by them; the programme over bytes."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch

from featherweight.errors import RecipeError
from featherweight.methods.budget.importance import lim_of, zd_of
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.allocate import Measuring, allocated, can_measure
from featherweight.tasks.compress.plan import make_plan
from models import make_tiny

G = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("orders") / "model")


def recipe(**allocation: object) -> Recipe:
    chosen = {"kind": "top-order", "grid": {"bits": 4}, **allocation}
    return recipe_from({"name": "mine", "grid": {"kind": "uniform", "bits": 2}, "allocation": chosen}, "mine")


def test_lim_is_minus_the_cosine() -> None:
    h = torch.randn(50, 8, generator=G)
    assert lim_of([[h, h]]) == pytest.approx([-1])  # a block that adds nothing
    assert lim_of([[h, h - 2 * h]]) == pytest.approx([1])  # and one that negates
    others = [[torch.randn(20, 8, generator=G) for _ in range(4)] for _ in range(3)]
    assert lim_of([[3 * state for state in window] for window in others]) == pytest.approx(lim_of(others), abs=1e-6)
    assert lim_of(others[::-1]) == pytest.approx(lim_of(others), abs=1e-6)
    assert len(lim_of(others)) == 3


@pytest.mark.parametrize(
    ("draw", "one_sided", "both"),
    [
        (torch.distributions.Normal(0.0, 1.0), 0.1587, 0.3173),
        (torch.distributions.Uniform(-1.0, 1.0), 0.2113, 0.4226),
        (torch.distributions.Laplace(0.0, 1.0), 0.1216, 0.2431),
    ],
)
def test_zd_of_known_distributions(draw: torch.distributions.Distribution, one_sided: float, both: float) -> None:
    torch.manual_seed(1)
    x = draw.sample((400_000,))
    assert zd_of([lambda: x]) == pytest.approx(one_sided, abs=0.002)
    assert zd_of([lambda: x], two_sided=True) == pytest.approx(both, abs=0.003)
    assert zd_of([lambda: x[:1000], lambda: x[1000:]]) == zd_of([lambda: x])  # pooled, not by matrix
    assert zd_of([lambda: 3 * x.double() + 5]) == zd_of([lambda: x.double()])


def test_zd_of_two_values_is_zero_and_sides_differ() -> None:
    assert zd_of([lambda: torch.tensor([1.0, -1.0] * 500)]) == 0
    skewed = torch.rand(10_000, generator=G) ** 4
    assert zd_of([lambda: skewed]) != zd_of([lambda: -skewed])
    assert zd_of([lambda: skewed], threshold=2.0) < zd_of([lambda: skewed])


def high(source: Path, measuring: Measuring | None = None, **allocation: object) -> set[int]:
    """Blocks that got four bits; all layers of a block have the same."""
    with Checkpoint.open(source) as checkpoint:
        plan = allocated(make_plan(checkpoint, recipe(**allocation)), checkpoint, measuring or Measuring())
    found: dict[int, set[int]] = {}
    for job in plan.jobs:
        if job.layer.block is not None:
            found.setdefault(job.layer.block, set()).add(job.treatment.grid.settings()["bits"])
    assert all(len(bits) == 1 for bits in found.values())
    return {block for block, bits in found.items() if bits == {4}}


def test_shares_reverses_and_controls(source: Path) -> None:
    assert high(source, score="zd", share=0) == set()
    assert high(source, score="zd", share=1) == {0, 1}
    first = high(source, score="zd", share=0.5)
    assert len(first) == 1
    assert high(source, score="zd", share=0.5, reverse=True) == {0, 1} - first
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, recipe(score="zd"))
        scores = []
        for block in (0, 1):
            layers = [layer for layer in plan.anatomy.layers if layer.block == block]
            scores.append(zd_of([lambda x=x: checkpoint.tensor(x.tensor) for x in layers]))
    assert first == {scores.index(min(scores))}
    assert {frozenset(high(source, score="random", share=0.5, seed=seed)) for seed in range(8)} == {
        frozenset({0}),
        frozenset({1}),
    }


def test_lim_takes_the_block_that_changes_its_input(source: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    still = tmp_path / "still"
    shutil.copytree(source, still)
    (file,) = still.glob("*.safetensors")
    tensors = load_file(file)
    for name in list(tensors):
        if ".layers.0." in name and ("o_proj" in name or "down_proj" in name):
            tensors[name] = torch.zeros_like(tensors[name])  # the first block adds nothing
    save_file(tensors, file, {"format": "pt"})
    windows = torch.randint(0, 256, (2, 32), generator=G)
    measuring = Measuring(windows=windows)
    assert high(still, measuring, score="lim", share=0.5) == {1}
    (still_score,) = [value for key, value in measuring.known.items() if key.startswith("lim-0-")]
    assert still_score == pytest.approx(-1, abs=1e-5)
    assert high(still, Measuring(windows=windows), score="lim", share=0.5, reverse=True) == {0}


def test_lim_without_text_is_refused(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, recipe(score="lim"))
        assert not can_measure(plan, Measuring())
        with pytest.raises(RecipeError, match="blocks ordered by lim need text .* allocation.score to zd"):
            allocated(plan, checkpoint, Measuring())


def test_top_n_is_best_for_what_adds_up() -> None:
    """Greedy by importance equals brute force for the sum of importance of coarse blocks."""
    draw = random.Random(0)
    for _ in range(20):
        scores, n = [draw.random() for _ in range(7)], draw.randint(0, 7)
        top = sorted(range(7), key=lambda i: -scores[i])[:n]
        best = min(
            math.fsum(s for i, s in enumerate(scores) if i not in kept) for kept in itertools.combinations(range(7), n)
        )
        assert math.fsum(s for i, s in enumerate(scores) if i not in top) == pytest.approx(best)


def test_the_programme_is_the_best_of_all(source: Path) -> None:
    """Rate and distortion: against brute force on four layers, never above the budget, never worse with more."""
    grids = [{"bits": bits} for bits in (2, 3, 4, 5)]
    costs = []
    with Checkpoint.open(source) as checkpoint:
        known: dict[str, float] = {}
        for bits in (2.9, 3.4, 4.2, 5.4):
            mapping = {"kind": "rate-distortion", "bits": bits, "grids": grids}
            chosen = recipe_from(
                {
                    "name": "mine", "grid": {"kind": "uniform", "bits": 2, "group_size": 32}, "allocation": mapping,
                    "layers": {"include": ["q_proj", "o_proj"]},
                },
                "mine",
            )  # fmt: skip
            from featherweight.methods.budget.base import LayerCandidates
            from featherweight.tasks.compress.allocate import measured

            plan = make_plan(checkpoint, chosen)
            errors = measured(plan, checkpoint, Measuring(known=known))
            items = [
                LayerCandidates.of(job.layer, plan.candidates[job.layer.name], errors[job.layer.name])
                for job in plan.jobs
            ]
            budget = math.floor(bits * sum(x.weights for x in items) / 8)
            best = min(
                math.fsum(x.weights * (c.error or 0) for x, c in zip(items, combination, strict=True))
                for combination in itertools.product(*(x.candidates for x in items))
                if sum(c.nbytes for c in combination) <= budget
            )
            given = allocated(plan, checkpoint, Measuring(known=known))
            assert given.code_bytes <= budget
            treatments = {job.layer.name: job.treatment for job in given.jobs}
            cost = math.fsum(
                x.weights * next(c.error or 0 for c in x.candidates if c.treatment == treatments[job.layer.name])
                for x, job in zip(items, plan.jobs, strict=True)
            )
            assert cost == pytest.approx(best)
            costs.append(cost)
    assert costs == sorted(costs, reverse=True)
