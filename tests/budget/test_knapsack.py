"""The multiple-choice knapsack against brute force, its bounds, and its front."""

from __future__ import annotations

import itertools
import random

import pytest

from featherweight.errors import FeatherError
from featherweight.methods.budget.knapsack import Option, frontier, solve, solve_exactly, solve_relaxed


def brute_force(items: list[list[Option]], budget: int) -> float:
    return min(
        sum(option.cost for option in chosen)
        for chosen in itertools.product(*items)
        if sum(option.nbytes for option in chosen) <= budget
    )


def some_items(draw: random.Random, most: int = 4) -> list[list[Option]]:
    """Costs that fall with bytes only on the whole: dominated options, equal sizes and bends that are not convex."""
    items = []
    for _ in range(draw.randint(1, most)):
        count = draw.randint(1, 4)
        sizes = [draw.randint(1, 60) for _ in range(count)]
        items.append([Option(size, round(draw.random() * 100 / size, 6)) for size in sizes])
    return items


def budget_of(draw: random.Random, items: list[list[Option]]) -> int:
    least, most = (sum(f(o.nbytes for o in item) for item in items) for f in (min, max))
    return draw.randint(least, most + 3)


def test_a_thousand_small_instances_equal_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        items = some_items(draw)
        budget = budget_of(draw, items)
        best = brute_force(items, budget)
        for found in (solve_exactly(items, budget), solve(items, budget)):
            assert found.nbytes <= budget
            assert found.cost == pytest.approx(best, rel=1e-12)
            assert found.bound <= best * (1 + 1e-12)


def test_the_lagrangian_keeps_to_the_budget_and_its_bound_holds() -> None:
    draw = random.Random(1)
    gaps = []
    for _ in range(300):
        items = some_items(draw)
        budget = budget_of(draw, items)
        found, best = solve_relaxed(items, budget), brute_force(items, budget)
        assert found.nbytes <= budget
        assert found.bound <= best * (1 + 1e-9) + 1e-12
        assert best <= found.cost * (1 + 1e-12)
        gaps.append(found.cost - best)
    assert sum(gap < 1e-9 for gap in gaps) > 150  # most small ones are met exactly all the same


def test_wide_cells_round_up_and_never_exceed_the_budget() -> None:
    draw = random.Random(2)
    for _ in range(100):
        items = [[Option(draw.randint(10**6, 10**8), draw.random()) for _ in range(5)] for _ in range(12)]
        budget = budget_of(draw, items)
        found = solve_exactly(items, budget, cells=500)
        assert found.nbytes <= budget
        assert found.cost <= solve_exactly(items, budget, cells=20).cost + 0.5  # finer cells waste less
        assert solve(items, budget).nbytes <= budget


def test_a_larger_budget_never_costs_more() -> None:
    draw = random.Random(3)
    for _ in range(50):
        items = some_items(draw, 6)
        least = sum(min(o.nbytes for o in item) for item in items)
        costs = [solve(items, least + more).cost for more in range(0, 80, 5)]
        assert costs == sorted(costs, reverse=True)


def test_ten_thousand_candidates_fill_the_budget() -> None:
    """1,400 layers with seven candidates, as of a large model."""
    draw = random.Random(4)
    items = []
    for _ in range(1400):
        weights, weight = draw.choice([4096 * 4096, 4096 * 11008, 1024 * 4096]), draw.random() + 0.1
        items.append([Option(weights * bits // 8, weight * 4.0**-bits) for bits in (1, 2, 3, 4, 5, 6, 8)])
    budget = sum(item[2].nbytes for item in items)
    found = solve(items, budget)
    assert budget * 0.999 < found.nbytes <= budget
    assert found.gap < 1e-3


def test_the_front_falls_and_its_ends_are_the_smallest_and_the_dearest() -> None:
    draw = random.Random(5)
    for _ in range(50):
        items = some_items(draw, 5)
        front = frontier(items)
        assert front[0].nbytes == sum(min(o.nbytes for o in item) for item in items)
        assert front[-1].cost == pytest.approx(sum(min(o.cost for o in item) for item in items))
        assert [one.nbytes for one in front] == sorted(one.nbytes for one in front)
        assert [one.cost for one in front] == sorted((one.cost for one in front), reverse=True)
        for one in front:
            assert solve(items, one.nbytes).cost == pytest.approx(one.cost, rel=1e-9)  # the hull is optimal there


def test_what_cannot_be_met_is_said_with_the_least_that_can() -> None:
    items = [[Option(3_000_000, 1.0)], [Option(2_000_000, 1.0), Option(4_000_000, 0.1)]]
    with pytest.raises(
        FeatherError, match=r"the budget is 4 MB, and with the smallest choice everywhere it takes 5 MB"
    ):
        solve(items, 4_000_000)


def test_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        solve([[Option(1, float("nan"))]], 1)
    with pytest.raises(ValueError, match="no option"):
        solve([[]], 1)
