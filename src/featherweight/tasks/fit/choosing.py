"""Giving out the bytes: which way each layer goes, by the divergence that its error is worth, within every pool."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featherweight.errors import FeatherError
from featherweight.methods.budget.knapsack import Option, Solution, frontier, solve
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.system.units import parse_size, size_text
from featherweight.tasks.fit.curves import Measured

REST = "rest"


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
    """

    measured: Mapping[str, Sequence[Measured]]
    worth: Mapping[str, float]
    groups: tuple[tuple[str, ...], ...]

    def options(self, group: Sequence[str]) -> list[Option]:
        """Of a group: the ways of its first layer, with the bytes and costs of all its layers."""
        found = []
        for place in range(len(self.measured[group[0]])):
            taken = [self.measured[name][place] for name in group]
            cost = math.fsum(self.worth[name] * one.error for name, one in zip(group, taken, strict=True))
            found.append(Option(sum(one.nbytes for one in taken), cost))
        return found

    def solved(self, budget: int, pools: Sequence[Pool] = ()) -> dict[str, int]:
        """By layer, the place of its way: least predicted divergence within a budget of code bytes, or within each
        of several pools. FeatherError where the smallest ways take more."""
        if not pools:
            return self._expanded(self.groups, solve([self.options(group) for group in self.groups], budget))
        found: dict[str, int] = {}
        for place, pool in enumerate(pools):
            own = tuple(group for group in self.groups if pool_of(group[0], pools) == place)
            if not own:
                raise FeatherError(f"no layer belongs to the pool {pool.pattern!r} of --budget: its name meets none")
            try:
                solution = solve([self.options(group) for group in own], pool.nbytes)
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
