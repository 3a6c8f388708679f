"""Diagnostics of recursive predictors (arXiv 2602.02110) on a linear toy world and a small network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.errors import EvaluationError
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.tasks.analyse.world_model import (
    decoupling,
    drift,
    kendall,
    module_sensitivity,
    ranking,
    ranks,
    rollout,
    spearman,
    top_k_overlap,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, dA and B with A a multiple of an orthogonal matrix."""
    orthogonal, _ = torch.linalg.qr(random(6, 6))
    return radius * orthogonal, 1e-4 * random(6, 6, seed=1), random(6, 2, seed=2)


@pytest.mark.parametrize("radius", [1.0, 0.7])
def test_drift_in_a_linear_world(radius: float) -> None:
    a, change, b = world(radius)
    start, actions = random(4, 6, seed=3), random(4, 40, 2, seed=4)
    original = rollout(lambda z, u: z @ a.T + u @ b.T, start, actions)
    compressed = rollout(lambda z, u: z @ (a + change).T + u @ b.T, start, actions)
    states = torch.cat([start.unsqueeze(1), original], 1)  # z_0 ... z_H
    for h in (1, 2, 7, 40):
        total = torch.zeros(4, 6, dtype=torch.float64)
        for i in range(h):  # sum of (A + dA)^(h-1-i) dA z_i
            step = torch.linalg.matrix_power(a + change, h - 1 - i)
            total += states[:, i] @ (step @ change).T
        assert torch.allclose(compressed[:, h - 1] - original[:, h - 1], total, atol=1e-12)
    found = drift(original, compressed)
    assert found.relative.shape == (40,)
    assert torch.allclose(found.growth, found.relative[1:] / found.relative[:-1])
    far = (compressed - original).norm(dim=-1).mean(0)
    if radius == 1:  # with bounded states it would grow as h; noise makes the states grow too
        free = rollout(lambda z, u: z @ a.T, start, actions), rollout(lambda z, u: z @ (a + change).T, start, actions)
        far = (free[1] - free[0]).norm(dim=-1).mean(0)
        assert far[39] == pytest.approx(float(far[9]) * 4, rel=0.35)
    else:
        assert far[39] < 3 * far[9]


def test_no_drift() -> None:
    states = random(3, 5, 4)
    found = drift(states, states.clone())
    assert torch.equal(found.relative, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(found.growth, torch.ones(4, dtype=torch.float64))
    with pytest.raises(EvaluationError, match="one shape"):
        drift(states, states[:, :4])


def test_ranks_share_ties() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12), st.integers(0, 1000))
def test_correlations_by_brute_force(values: list[int], seed: int) -> None:
    one = torch.tensor(values, dtype=torch.float64)
    other = torch.randint(-5, 6, (len(values),), generator=torch.Generator().manual_seed(seed)).double()
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    signs = [(float((one[i] - one[j]).sign()), float((other[i] - other[j]).sign())) for i, j in pairs]
    untied = [sum(s[k] != 0 for s in signs) for k in (0, 1)]
    if 0 in untied:
        assert kendall(one, other) == spearman(one, other) == 0
        return
    assert kendall(one, other) == pytest.approx(sum(a * b for a, b in signs) / (untied[0] * untied[1]) ** 0.5)
    both = torch.stack([ranks(one), ranks(other)])
    assert spearman(one, other) == pytest.approx(float(torch.corrcoef(both)[0, 1]))


def test_ranking() -> None:
    costs = random(300).abs()
    same = ranking(costs, costs.clone())
    assert (same.spearman, same.kendall, same.top_k_overlap) == (pytest.approx(1), pytest.approx(1), 1.0)
    bent = ranking(costs, (3 * costs).exp() + 1)
    assert (bent.spearman, bent.kendall, bent.top_k_overlap) == (pytest.approx(1), pytest.approx(1), 1.0)
    assert ranking(costs, -costs).spearman == pytest.approx(-1)
    overlaps = [top_k_overlap(random(300, seed=s), random(300, seed=s + 500), 30) for s in range(60)]
    assert sum(overlaps) / 60 == pytest.approx(0.1, abs=0.03)
    with pytest.raises(EvaluationError, match="k = 0"):
        top_k_overlap(costs, costs, 0)


def test_a_constant_model_is_flagged() -> None:
    """Card, item 5: all latents map to one, so every candidate costs the same."""
    costs = random(300).abs()
    flat = ranking(costs, torch.full((300,), 2.0))
    assert not flat.defined
    assert (flat.spearman, flat.kendall, flat.top_k_overlap) == (0, 0, 0)
    success = (costs < costs.median()).double()
    found = decoupling({"original": costs, "constant": torch.ones(300)}, {"original": success, "constant": success})
    assert found["original"] < -0.8
    assert found["constant"] == 0


def test_module_sensitivity() -> None:
    torch.manual_seed(0)
    parts = {"encoder": nn.Linear(64, 32), "predictor": nn.Sequential(nn.Linear(36, 64), nn.Tanh(), nn.Linear(64, 32))}
    images, actions = random(16, 64).float(), random(16, 6, 4, seed=1).float()

    def states() -> Tensor:
        start = parts["encoder"](images)
        return rollout(lambda z, a: parts["predictor"](torch.cat([z, a], 1)), start.detach(), actions)

    reference = states()
    grids = {"16": None, "8": UniformGrid(bits=8), "3": UniformGrid(bits=3)}
    rows = module_sensitivity(parts, grids, lambda: (states(), drift(reference, states()).relative[-1]))
    assert [(row["part"], row["grid"]) for row in rows[:3]] == [("encoder", "16"), ("predictor", "16"), ("all", "16")]
    for row in rows[:3]:
        assert torch.equal(row["result"][0], reference)
    found = {(row["part"], row["grid"]): float(row["result"][1]) for row in rows}
    assert all(0 < found[part, "8"] < found[part, "3"] for part in ("encoder", "predictor", "all"))
    sizes = {(row["part"], row["grid"]): row["bytes"] for row in rows}
    assert sizes["all", "3"] < min(sizes["encoder", "3"], sizes["predictor", "3"]) < sizes["all", "16"]
    assert torch.equal(states(), reference)
