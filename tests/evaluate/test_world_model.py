"""World-model diagnostics: closed forms, invariances, and a toy encoder with a recurrent predictor and a planner."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.evaluate.world_model import (
    CrossEntropyPlanner,
    coupling,
    drift,
    kendall,
    measured,
    module_sensitivity,
    quantised,
    quantize_omse,
    ranking,
    ranks,
    rollout,
    spearman,
    top_overlap,
)
from featherweight.quantize.activations import affine_inputs, input_range, omse_input_range


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- drift ---


def linear_world(matrix: Tensor, control: Tensor) -> object:
    return lambda latents, action: latents @ matrix.T + action @ control.T


@pytest.mark.parametrize("radius", [1.0, 0.6])
def test_drift_of_a_linear_world_in_closed_form(radius: float) -> None:
    size, steps = 6, 80
    rotation = torch.linalg.qr(gaussian(size, size).double()).Q * radius
    change, control = 1e-4 * gaussian(size, size, seed=1).double(), gaussian(size, 2, seed=2).double()
    control = control * (0 if radius == 1 else 1)  # undriven, a latent keeps its length
    start, actions = gaussian(20, size, seed=3).double(), gaussian(1, 1, 2).double().expand(20, steps, 2)
    exact = rollout(linear_world(rotation, control), start, actions)  # type: ignore[arg-type]
    other = rollout(linear_world(rotation + change, control), start, actions)  # type: ignore[arg-type]
    visited = torch.cat([start.unsqueeze(1), exact], 1)
    for h in (1, 2, 7):
        power = [torch.linalg.matrix_power(rotation + change, h - 1 - i) for i in range(h)]
        expected = sum(visited[:, i] @ (power[i] @ change).T for i in range(h))
        assert torch.allclose(other[:, h - 1] - exact[:, h - 1], expected, atol=1e-12)
    found = drift(exact, other)
    assert found.relative.shape == (steps,)
    assert found.growth.shape == (steps - 1,)
    amplitude = found.relative.sqrt()
    if radius == 1:  # in proportion to h for each pair of eigenvectors, so between the root of h and h in all
        assert 0.5 < math.log(float(amplitude[79] / amplitude[9])) / math.log(8) < 1.2
    else:
        assert float(amplitude[79] / amplitude[39]) == pytest.approx(1, abs=0.02)
        assert float(found.growth[-1]) == pytest.approx(1, abs=0.01)


def test_drift_of_equal_models_is_zero() -> None:
    latents = gaussian(3, 5, 4)
    found = drift(latents, latents)
    assert not found.relative.any()
    assert bool(found.growth.isnan().all())
    assert drift(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).relative.tolist() == [0, 0]


# --- ranking ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_rankings_by_brute_force(values: list[int], random: object) -> None:
    other = list(values)
    random.shuffle(other)  # type: ignore[attr-defined]
    a, b = torch.tensor(values), torch.tensor(other)

    def rank(items: list[int]) -> list[float]:
        return [sum(y < x for y in items) + (sum(y == x for y in items) - 1) / 2 for x in items]

    assert ranks(a).tolist() == rank(values)
    if len(set(values)) == 1:
        assert spearman(a, b) == kendall(a, b) == 0
        return
    both = torch.tensor([rank(values), rank(other)], dtype=torch.float64)
    assert spearman(a, b) == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-12)
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    total = sum(
        ((values[i] > values[j]) - (values[i] < values[j])) * ((other[i] > other[j]) - (other[i] < other[j]))
        for i, j in pairs
    )
    untied = [sum(items[i] != items[j] for i, j in pairs) for items in (values, other)]
    assert kendall(a, b) == pytest.approx(total / math.sqrt(untied[0] * untied[1]), abs=1e-12)


def test_ranking_is_one_for_equal_models_and_under_monotone_changes() -> None:
    costs = gaussian(300).square()
    for other in (costs, costs * 7 + 2, costs.exp(), costs.sqrt()):
        assert ranking(costs, other) == (found := ranking(costs, costs))
        assert (found.spearman, found.kendall, found.overlap) == pytest.approx((1, 1, 1))
    assert ranking(costs, -costs).spearman == pytest.approx(-1)


def test_ranking_of_random_costs_is_chance() -> None:
    found = [ranking(gaussian(300, seed=2 * i), gaussian(300, seed=2 * i + 1)) for i in range(40)]
    assert sum(r.overlap for r in found) / 40 == pytest.approx(30 / 300, abs=0.03)
    assert abs(sum(r.spearman for r in found)) / 40 < 0.03
    assert top_overlap(gaussian(10), gaussian(10, seed=1), 50) == 1.0


def test_constant_and_infinite_costs_rank_nothing() -> None:
    costs = gaussian(50)
    for useless in (torch.zeros(50), torch.full((50,), torch.nan), costs / 0):
        found = ranking(costs, useless)
        assert (found.spearman, found.kendall, found.overlap) == (0, 0, 0)


# --- activations ---


def test_static_and_dynamic_ranges_agree_where_all_tokens_have_the_same() -> None:
    inputs = gaussian(20, 32)
    inputs[:, 0], inputs[:, 1] = -5.0, 7.0
    results = [affine_inputs(inputs, 8, *input_range(inputs, per_token)) for per_token in (False, True)]
    assert torch.equal(*results)
    assert bool(((results[0] - inputs).abs() <= 12 / 255 * 0.51).all())
    inputs[3, 1] = 70.0
    dynamic = affine_inputs(inputs, 8, *input_range(inputs, True))
    assert torch.equal(dynamic[4:], results[1][4:])
    assert not torch.equal(affine_inputs(inputs, 8, *input_range(inputs, False))[4:], results[1][4:])


def test_ranges_contain_zero_and_are_shrunk_when_it_pays() -> None:
    inputs = gaussian(64, 64) + 10
    low, high = input_range(inputs, per_token=False)
    assert float(low) == 0
    assert not affine_inputs(torch.zeros(2, 4), 4, *input_range(torch.zeros(2, 4), True)).any()
    inputs = gaussian(256, 64)
    low, high = input_range(inputs, per_token=False)
    shrunk = omse_input_range(inputs, 3, low, high)
    assert float(shrunk[1]) < 0.9 * float(high)
    errors = [float((affine_inputs(inputs, 3, *r) - inputs).norm()) for r in ((low, high), shrunk)]
    assert errors[1] < errors[0]


# --- planning ---


class Toy(nn.Module):
    """Observations of 64 numbers, latents of 32, actions of 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
        self.inner = nn.Sequential(nn.Linear(34, 128), nn.Tanh(), nn.Linear(128, 32))

    def predictor(self, latents: Tensor, action: Tensor) -> Tensor:
        return latents + 0.5 * self.inner(torch.cat([latents, action], -1))

    @torch.no_grad()
    def costs(self, start: Tensor, goal: Tensor, actions: Tensor) -> Tensor:
        first, last = self.encoder(start), self.encoder(goal)
        reached = rollout(self.predictor, first.expand(len(actions), -1), actions)[:, -1]
        return (reached - last).square().mean(-1)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


def modules_of(toy: Toy) -> dict[str, nn.Module]:
    return {"encoder": toy.encoder, "predictor": toy.inner}


START, GOAL = gaussian(1, 64, seed=11), gaussian(1, 64, seed=12)


def test_sixteen_bits_are_the_model_itself_and_weights_come_back(toy: Toy) -> None:
    before = {name: p.clone() for name, p in toy.named_parameters()}
    candidates = gaussian(50, 5, 2)
    reference = toy.costs(START, GOAL, candidates)
    whole = sum(p.numel() * p.element_size() for p in toy.parameters())
    entry = measured(
        modules_of(toy),
        {"encoder": 16, "predictor": 16},
        lambda: float((toy.costs(START, GOAL, candidates) - reference).abs().max()),
    )
    assert (entry.value, entry.nbytes) == (0.0, whole)

    def interrupted() -> None:
        with quantised(toy.encoder, 3):
            assert not torch.equal(toy.encoder[0].weight, before["encoder.0.weight"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert all(torch.equal(p, before[name]) for name, p in toy.named_parameters())


def test_sensitivity_counts_bytes_and_orders_bits(toy: Toy) -> None:
    candidates = gaussian(300, 5, 2)
    reference = toy.costs(START, GOAL, candidates)
    found = module_sensitivity(
        modules_of(toy), lambda: ranking(reference, toy.costs(START, GOAL, candidates)).spearman, bits=(2, 4, 8)
    )
    assert len(found) == 9
    assert [entry.nbytes for entry in found] == sorted(entry.nbytes for entry in found)
    by_bits = {(entry.bits["encoder"], entry.bits["predictor"]): entry for entry in found}
    for pair in ((8, 8), (8, 16), (16, 8)):
        assert by_bits[pair].value > 0.99
    assert by_bits[2, 2].value < by_bits[4, 4].value < by_bits[8, 8].value
    linear = [m.weight for module in modules_of(toy).values() for m in module.modules() if isinstance(m, nn.Linear)]
    whole = sum(p.numel() * p.element_size() for p in toy.parameters())
    saved = sum(w.numel() * 4 - quantize_omse(w.data, 2).nbytes for w in linear)
    assert by_bits[2, 2].nbytes == whole - saved


def test_drift_of_the_toy_grows_while_one_step_looks_harmless(toy: Toy) -> None:
    actions = gaussian(100, 12, 2)
    with torch.no_grad():
        start = toy.encoder(gaussian(100, 64, seed=5))
        exact = rollout(toy.predictor, start, actions)
        with quantised(toy.inner, 4):
            other = rollout(toy.predictor, start, actions)
    found = drift(exact, other)
    assert float(found.relative[0]) < 0.01
    assert float(found.relative[-1]) > 4 * float(found.relative[0])


def test_planner_finds_a_known_optimum_and_repeats() -> None:
    target = gaussian(5, 2, seed=3)
    planner = CrossEntropyPlanner(iterations=25)
    plans = [
        planner.plan(lambda a: (a - target).square().sum((1, 2)), 2, torch.Generator().manual_seed(0)) for _ in range(2)
    ]
    assert torch.allclose(plans[0][0], target, atol=0.05)
    assert plans[0][1] < 0.01
    assert torch.equal(plans[0][0], plans[1][0])


def test_planning_in_the_toy_with_common_random_numbers(toy: Toy) -> None:
    planner = CrossEntropyPlanner(candidates=100, elite=10, iterations=4)

    def planned() -> tuple[Tensor, float]:
        return planner.plan(lambda a: toy.costs(START, GOAL, a), 2, torch.Generator().manual_seed(1))

    reference, best = planned()
    assert best < float(toy.costs(START, GOAL, torch.zeros(1, 5, 2))[0])
    with quantised(toy.encoder, 8), quantised(toy.inner, 8):
        close = planned()[0]
    with quantised(toy.encoder, 2), quantised(toy.inner, 2):
        far = planned()[0]
    truth = [float(toy.costs(START, GOAL, plan.unsqueeze(0))[0]) for plan in (close, far)]
    assert truth[0] < best * 1.02
    assert truth[1] > truth[0]


def test_latents_that_collapse_are_flagged() -> None:
    """A constant latent: planner cost without variance, success by chance."""
    success = gaussian(60) > 0
    collapsed = coupling(torch.full((60,), 0.3), success)
    assert (collapsed.constant, collapsed.decoupled, collapsed.agreement) == (True, True, 0.0)
    honest = coupling(torch.where(success, 0.1, 1.0) + 0.01 * gaussian(60, seed=1), success)
    assert not honest.decoupled
    assert honest.agreement > 0.8
    unrelated = coupling(gaussian(60, seed=2), success)
    assert unrelated.decoupled
    assert not unrelated.constant
    assert coupling(gaussian(9), torch.ones(9)).agreement == 0.0
