"""The multiple-choice knapsack: of every item one option, least cost in all, within a budget of bytes.

    minimise  sum_l cost_l(c_l)   subject to   sum_l bytes_l(c_l) <= budget

Two ways. `solve_exactly` is the dynamic programme over bytes (RD-Pruning, arXiv 2308.10438, and ROCKET, arXiv
2602.11008, solve the same problem so): what options take above the smallest of their item is counted in cells, rounded
up where cells are wider than one byte in common, so that the budget is never exceeded. Where the budget has no more
cells than bytes that all options share, it is exact. `solve_relaxed` is the Lagrangian: each item takes the option of
least cost + price * bytes, and the price that just fits is found by bisection; its answer is followed by a bound below
which no answer can be, so the gap is known. `solve` takes the first where that is quick and the second otherwise, and
spends what is left over either way on the options that gain most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featherweight.errors import FeatherError
from featherweight.system.units import size_text

CELLS = 1 << 15
"""Cells into which a budget is cut at most."""
QUICK = 400_000_000
"""Options times cells above which the Lagrangian is taken: a few seconds of the programme."""


@dataclass(frozen=True)
class Option:
    """nbytes : what it stores; cost : what it costs in quality, in any unit that adds up"""

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """chosen : the place of each item's option
    nbytes, cost : of all of them
    bound : no choice within the budget costs less
    """

    chosen: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How much dearer than the best choice this one can be, relative to its cost."""
        return (self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


def solve(items: Sequence[Sequence[Option]], budget: int) -> Solution:
    """The choice that costs least within `budget` bytes.

    Raises
    ------
    FeatherError
        The smallest options take more; the text says how much.
    ValueError
        A cost is not finite, or an item has no option.
    """
    _check(items, budget)
    cells = min(CELLS, _exact_cells(items, budget))
    options = sum(len(_useful(item)) for item in items)
    relaxed = solve_relaxed(items, budget)
    if relaxed.gap <= 1e-9 or options * cells > QUICK:
        return relaxed
    exact = solve_exactly(items, budget)
    best = min((exact, relaxed), key=lambda one: (one.cost, one.nbytes))
    return Solution(best.chosen, best.nbytes, best.cost, max(exact.bound, relaxed.bound))


def solve_exactly(items: Sequence[Sequence[Option]], budget: int, cells: int = CELLS) -> Solution:
    """By dynamic programming over at most so many cells; see the module."""
    _check(items, budget)
    least = [min(option.nbytes for option in item) for item in items]
    room = budget - sum(least)
    step = _common(items)
    exact = room // step <= cells
    width = step if exact else -(-room // cells)
    last = room // width
    best = np.zeros(last + 1)
    picks: list[np.ndarray] = []
    for item, floor in zip(items, least, strict=True):
        useful = _useful(item)
        found = np.full(last + 1, np.inf)
        pick = np.zeros(last + 1, np.int16)
        for place in useful:
            taken = -(-(item[place].nbytes - floor) // width)
            if taken > last:
                continue
            cost = best[: last + 1 - taken] + item[place].cost
            part = found[taken:]
            better = cost < part
            part[better] = cost[better]
            pick[taken:][better] = place
        best = found
        picks.append(pick)
    chosen, cell = [0] * len(items), last
    for number in range(len(items) - 1, -1, -1):
        chosen[number] = int(picks[number][cell])
        cell -= -(-(items[number][chosen[number]].nbytes - least[number]) // width)
    spent = _spend(items, chosen, budget)
    bound = float(best[last]) if exact else -math.inf
    return _solution(items, spent, bound)


def solve_relaxed(items: Sequence[Sequence[Option]], budget: int) -> Solution:
    """By a price on bytes; `bound` is the Lagrangian's value at it."""
    _check(items, budget)
    width = max(len(item) for item in items)
    sizes, costs = np.full((len(items), width), np.inf), np.full((len(items), width), np.inf)
    for row, item in enumerate(items):
        sizes[row, : len(item)] = [option.nbytes for option in item]
        costs[row, : len(item)] = [option.cost for option in item]
    there = np.isfinite(sizes)
    rows = np.arange(len(items))

    def at(price: float) -> tuple[np.ndarray, float, float]:
        """Cheapest options at a price, smaller ones first among equals; their bytes, and the Lagrangian."""
        total = np.where(there, costs + price * np.where(there, sizes, 0.0), np.inf)
        least = total.min(1, keepdims=True)
        equal = total <= least
        place = np.where(equal, sizes, np.inf).argmin(1)
        return place, float(sizes[rows, place].sum()), float(least.sum() - price * budget)

    place, taken, bound = at(0.0)
    if taken <= budget:
        return _solution(items, [int(p) for p in place], bound)
    spread = float(costs[there].max() - costs[there].min())
    low, high = 0.0, max(spread, 1e-300)
    while at(high)[1] > budget and high < 1e300:
        low, high = high, high * 16
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if at(middle)[1] > budget:
            low = middle
        else:
            high = middle
    place, _, bound = at(high)
    bound = max(bound, at(low)[2])
    return _solution(items, _spend(items, [int(p) for p in place], budget), bound)


def frontier(items: Sequence[Sequence[Option]]) -> list[Solution]:
    """The choices that are best at some price, from the smallest to the dearest: the lower convex hull of cost over
    bytes of all choices, one option changing at a time."""
    hulls = [_hull(item) for item in items]
    place = [0] * len(items)
    steps = sorted(
        (-(item[b].cost - item[a].cost) / (item[b].nbytes - item[a].nbytes), -number, -index)
        for number, (item, hull) in enumerate(zip(items, hulls, strict=True))
        for index, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    )
    chosen = [hull[0] for hull in hulls]
    found = [_solution(items, list(chosen), -math.inf)]
    for _, number, _ in reversed(steps):
        number = -number
        place[number] += 1
        chosen[number] = hulls[number][place[number]]
        found.append(_solution(items, list(chosen), -math.inf))
    return found


def _hull(item: Sequence[Option]) -> list[int]:
    """Places of an item's options on the lower convex hull of cost over bytes, from the smallest."""
    hull: list[int] = []

    def slope(one: int, other: int) -> float:
        return (item[other].cost - item[one].cost) / (item[other].nbytes - item[one].nbytes)

    for place in _useful(item):
        while len(hull) > 1 and slope(hull[-2], place) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(place)
    return hull


def _useful(item: Sequence[Option]) -> list[int]:
    """Places of the options that no smaller or equal one beats, from the smallest."""
    found: list[int] = []
    for place in sorted(range(len(item)), key=lambda p: (item[p].nbytes, item[p].cost)):
        if not found or item[place].cost < item[found[-1]].cost:
            found.append(place)
    return found


def _spend(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> list[int]:
    """Use what is left of a budget: the change that gains most a byte, as long as one fits."""
    left = budget - sum(item[place].nbytes for item, place in zip(items, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for number, (item, place) in enumerate(zip(items, chosen, strict=True)):
            here = item[place]
            for other, option in enumerate(item):
                more = option.nbytes - here.nbytes
                if option.cost < here.cost and more <= left:
                    gain = (here.cost - option.cost) / max(1, more)
                    if best is None or gain > best[0]:
                        best = (gain, number, other)
        if best is None:
            return chosen
        _, number, other = best
        left -= items[number][other].nbytes - items[number][chosen[number]].nbytes
        chosen[number] = other


def _solution(items: Sequence[Sequence[Option]], chosen: list[int], bound: float) -> Solution:
    taken = [item[place] for item, place in zip(items, chosen, strict=True)]
    cost = math.fsum(option.cost for option in taken)
    return Solution(tuple(chosen), sum(option.nbytes for option in taken), cost, min(bound, cost))


def _common(items: Sequence[Sequence[Option]]) -> int:
    """The largest number of bytes by which all options of an item differ."""
    found = 0
    for item in items:
        floor = min(option.nbytes for option in item)
        for option in item:
            found = math.gcd(found, option.nbytes - floor)
    return found or 1


def _exact_cells(items: Sequence[Sequence[Option]], budget: int) -> int:
    least = sum(min(option.nbytes for option in item) for item in items)
    return (budget - least) // _common(items) + 1


def _check(items: Sequence[Sequence[Option]], budget: int) -> None:
    if not all(items):
        raise ValueError("an item has no option")
    if not all(math.isfinite(option.cost) for item in items for option in item):
        raise ValueError("the cost of an option is not a finite number")
    least = sum(min(option.nbytes for option in item) for item in items)
    if least > budget:
        raise FeatherError(
            f"the budget is {size_text(budget)}, and with the smallest choice everywhere it takes {size_text(least)}: "
            "allow as much, or name smaller choices"
        )
