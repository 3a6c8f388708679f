"""Giving out the bytes: which way each layer goes, by the divergence that its error is worth, within every pool."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from featherweight.errors import FeatherError
from featherweight.methods.budget.knapsack import Option, Solution, frontier, solve
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.system.units import parse_size, size_text
from featherweight.tasks.fit.curves import Measured
from featherweight.tasks.fit.greedy import greedy

REST = "rest"
BISECTIONS = 30
"""Of the price of a second."""


@dataclass(frozen=True)
class Pool:
    """Layers whose names meet a pattern, and the bytes that their codes may take together."""

    pattern: str
    nbytes: int


def pools_of(text: str) -> tuple[Pool, ...]:
    """`experts=12GB,rest=6GB`: patterns with sizes; a name without * or ? is looked for anywhere in a layer's name."""
    pools = []
    for part in text.split(","):
        name, sign, size = part.strip().partition("=")
        if not sign or not name.strip():
            raise FeatherError(f"--budget {text!r} is not like experts=12GB,rest=6GB: {part.strip()!r} has no size")
        pools.append(Pool(name.strip(), parse_size(size.strip(), "--budget")))
    return tuple(pools)


def pool_of(name: str, pools: Sequence[Pool]) -> int:
    """The first pool that a layer belongs to. FeatherError where it belongs to none."""
    for place, pool in enumerate(pools):
        pattern = pool.pattern if any(c in pool.pattern for c in "*?[") else f"*{pool.pattern}*"
        if pool.pattern == REST or fnmatch.fnmatchcase(name, pattern):
            return place
    raise FeatherError(f"the layer {name} belongs to no pool of --budget: add rest=SIZE")


@dataclass(frozen=True)
class Problem:
    """What is chosen among.

    measured : by layer, its ways
    worth : by layer, divergence for an error of one (see `sensitivity`)
    groups : names of layers that go one way together, each layer in one group
    seconds : by layer, what each of its ways takes for a token; empty where speed does not count
    most_seconds : what a choice may take for a token
    solver : "knapsack", or the control "greedy" (see `greedy`)
    """

    measured: Mapping[str, Sequence[Measured]]
    worth: Mapping[str, float]
    groups: tuple[tuple[str, ...], ...]
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    most_seconds: float = math.inf
    solver: str = "knapsack"

    def options(self, group: Sequence[str], price: float = 0.0) -> list[Option]:
        """Of a group: the ways of its first layer, with the bytes and costs of all its layers.

        price : of a second, in the unit of costs; where it is infinite, seconds alone are costs
        """
        found = []
        for place in range(len(self.measured[group[0]])):
            taken = [self.measured[name][place] for name in group]
            cost = math.fsum(self.worth[name] * one.error for name, one in zip(group, taken, strict=True))
            if price:
                slow = math.fsum(self.seconds[name][place] for name in group)
                cost = slow if math.isinf(price) else cost + price * slow
            found.append(Option(sum(one.nbytes for one in taken), cost))
        return found

    def taken_seconds(self, chosen: Mapping[str, int]) -> float:
        """For one token, in products with the layers; 0 where speed does not count."""
        return math.fsum(self.seconds[name][place] for name, place in chosen.items() if name in self.seconds)

    def solved(self, budget: int, pools: Sequence[Pool] = ()) -> dict[str, int]:
        """By layer, the place of its way: least predicted divergence within a budget of code bytes, or within each of
        several pools, that takes no more than `most_seconds` a token. The price of a second that just keeps to it is
        found by bisection. FeatherError where the smallest ways take more bytes, or the fastest more time."""
        found = self._priced(budget, pools)
        if self.taken_seconds(found) <= self.most_seconds:
            return found
        found = self._priced(budget, pools, math.inf)
        least = self.taken_seconds(found)
        if least > self.most_seconds:
            raise FeatherError(
                f"--tokens-per-second {1 / self.most_seconds:.3g} cannot be met within the budget: the fastest that "
                f"these choices make here is {1 / least:.3g} tokens a second; ask for as much, or for fewer bytes"
            )
        low, high = 0.0, max(self.cost(found), 1e-12) / least
        for _ in range(60):
            other = self._priced(budget, pools, high)
            if self.taken_seconds(other) <= self.most_seconds:
                found = other
                break
            low, high = high, high * 4
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            other = self._priced(budget, pools, middle)
            if self.taken_seconds(other) <= self.most_seconds:
                high = middle
                found = min(found, other, key=self.cost)
            else:
                low = middle
        return found

    def _solve(self, items: list[list[Option]], budget: int) -> Solution:
        best = solve(items, budget)  # says what is wrong
        if self.solver != "greedy":
            return best
        chosen = greedy(items, budget)
        taken = [item[place] for item, place in zip(items, chosen, strict=True)]
        return Solution(tuple(chosen), sum(x.nbytes for x in taken), math.fsum(x.cost for x in taken), best.bound)

    def _priced(self, budget: int, pools: Sequence[Pool], price: float = 0.0) -> dict[str, int]:
        if not pools:
            items = [self.options(group, price) for group in self.groups]
            return self._expanded(self.groups, self._solve(items, budget))
        found: dict[str, int] = {}
        for place, pool in enumerate(pools):
            own = tuple(group for group in self.groups if pool_of(group[0], pools) == place)
            if not own:
                raise FeatherError(f"no layer belongs to the pool {pool.pattern!r} of --budget: its name meets none")
            try:
                solution = self._solve([self.options(group, price) for group in own], pool.nbytes)
            except FeatherError as error:
                raise FeatherError(f"the pool {pool.pattern!r} of --budget is too small: {error}") from None
            found |= self._expanded(own, solution)
        return found

    def uniform(self, budget: int) -> dict[str, int] | None:
        """One way for all layers that have the same ones, and for the others the best that then fits: what a preset of
        the best of these ways would be. None where no way fits everywhere."""
        names = [one.way.name for one in max(self.measured.values(), key=len)]
        alike = {n for n, ways in self.measured.items() if [one.way.name for one in ways] == names}
        others = tuple(group for group in self.groups if group[0] not in alike)
        found: list[dict[str, int]] = []
        for place in range(len(names)):
            chosen = dict.fromkeys(alike, place)
            room = budget - self.nbytes(chosen)
            items = [self.options(group) for group in others]
            if room >= sum(min(option.nbytes for option in item) for item in items):
                found.append(chosen | self._expanded(others, solve(items, room)) if items else chosen)
        return min(found, key=self.cost, default=None)

    def front(self, points: int) -> list[dict[str, int]]:
        """Choices from the smallest model to that of the least divergence, about `points` of them, evenly in bytes."""
        found = frontier([self.options(group) for group in self.groups])
        low, high = found[0].nbytes, found[-1].nbytes
        kept: list[Solution] = []
        for number in range(points):
            want = low + (high - low) * number / max(1, points - 1)
            one = max((s for s in found if s.nbytes <= want), key=lambda s: s.nbytes)
            if not kept or one.nbytes > kept[-1].nbytes:
                kept.append(one)
        return [self._expanded(self.groups, one) for one in kept]

    @staticmethod
    def _expanded(groups: Sequence[Sequence[str]], solution: Solution) -> dict[str, int]:
        return {name: place for group, place in zip(groups, solution.chosen, strict=True) for name in group}

    def nbytes(self, chosen: Mapping[str, int]) -> int:
        """Of all codes."""
        return sum(self.measured[name][place].nbytes for name, place in chosen.items())

    def cost(self, chosen: Mapping[str, int]) -> float:
        """The divergence that the linear model predicts."""
        return math.fsum(self.worth[name] * self.measured[name][place].error for name, place in chosen.items())

    def least(self) -> int:
        """Bytes of the smallest ways."""
        return sum(min(one.nbytes for one in ways) for ways in self.measured.values())


def groups_of(layers: Sequence[LinearLayer], alike: bool) -> tuple[tuple[str, ...], ...]:
    """Each layer by itself; or, `alike`, those together that programs fuse into one matrix: queries, keys and values
    that read one input, gates and the layers beside them."""
    if not alike:
        return tuple((layer.name,) for layer in layers)
    found: dict[tuple[int | None, str], list[str]] = {}
    for layer in layers:
        shared = layer.block is not None and layer.kind in ("attention", "mlp", "expert")
        found.setdefault((layer.block, layer.input_group if shared else layer.name), []).append(layer.name)
    return tuple(tuple(names) for names in found.values())


def check_budget(budget: int, least: int, most: int, what: str) -> None:
    """FeatherError for a budget of the whole file below the smallest possible, or above the original's size."""
    if budget < least:
        raise FeatherError(
            f"{what} is {size_text(budget)}, and the smallest that these choices make of this model is "
            f"{size_text(least)}: allow as much, or name smaller choices"
        )
    if budget > most:
        raise FeatherError(
            f"{what} is {size_text(budget)}, more than the original's {size_text(most)}: nothing needs to be done to it"
        )
