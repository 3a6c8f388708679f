"""From what adds up on paper to what is true: the chosen model is put together, and bytes move where that pays.

The linear model of the divergence leaves out that layers' errors meet each other. So the model of the choice is put
together from the codes that were made for measuring, and its true divergence taken; then, one group of layers after the
other (a role in a third of the depth), what it truly gains if all its layers go one way up. The ratio of that to what
was predicted corrects the worth of the group's layers, and the bytes are given out again; the new choice is kept where
its true divergence is lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.tasks.fit.choosing import Pool, Problem
from featherweight.tasks.fit.curves import Curves
from featherweight.tasks.fit.sensitivity import Network

THIRDS = 3
LIMIT = 5.0
"""Most by which a worth is corrected in a round, either way."""


@dataclass(frozen=True)
class Refined:
    """chosen : the place of each layer's way
    divergence : true, of the model put together
    before : that of the first choice
    predicted : by the linear model, of the choice
    evaluations : how many models were put together
    uniform : true divergence of the best model of one way everywhere within the budget; None where there is none
    """

    chosen: dict[str, int]
    divergence: float
    before: float
    predicted: float
    evaluations: int
    uniform: float | None = None


class Assembled:
    """A model put together from measured codes, and what changes of it are worth. Decoded matrices are kept."""

    def __init__(self, network: Network, curves: Curves) -> None:
        self.network, self.curves = network, curves
        self.evaluations = 0
        self._held: dict[str, tuple[int, Tensor]] = {}

    def divergence(self, chosen: Mapping[str, int]) -> float:
        """True divergence of the model in which every layer goes its way."""
        weights = {}
        for name, place in chosen.items():
            held = self._held.get(name)
            if held is None or held[0] != place:
                matrix = self.curves.code(self.curves.measured[name][place]).decode().to(self.network.whole.host.dtype)
                held = (place, matrix)
                self._held[name] = held
            weights[name] = held[1]
        self.evaluations += 1
        return self.network.divergence(weights)


def refine(
    problem: Problem,
    layers: Sequence[LinearLayer],
    assembled: Assembled,
    budget: int,
    *,
    pools: Sequence[Pool] = (),
    rounds: int = 2,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Refined:
    """See the module.

    budget : of code bytes
    rounds : how often worths are corrected
    told : called with the evaluations that are done, and how many there are at most
    """
    chosen = problem.solved(budget, pools)
    sets = _sets(layers, chosen)
    most = 1 + rounds * (len(sets) + 1)
    told(0, most)
    best = before = assembled.divergence(chosen)
    for _ in range(rounds):
        worth = dict(problem.worth)
        for names in sets:
            ratio = _in_context(problem, chosen, names, assembled, best)
            worth.update({name: worth[name] * ratio for name in names})
            told(assembled.evaluations, most)
        problem = replace(problem, worth=worth)
        other = problem.solved(budget, pools)
        if other == chosen:
            break
        found = assembled.divergence(other)
        told(assembled.evaluations, most)
        if found >= best:
            break
        chosen, best = other, found
    one_way = None if pools else problem.uniform(budget)
    uniform = None if one_way is None else assembled.divergence(one_way)
    told(most, most)
    return Refined(chosen, best, before, problem.cost(chosen), assembled.evaluations, uniform)


def _sets(layers: Sequence[LinearLayer], chosen: Mapping[str, int]) -> list[list[str]]:
    """A role in a third of the depth; matrices outside the blocks are sets of their own."""
    blocks = 1 + max((layer.block for layer in layers if layer.block is not None), default=0)
    found: dict[tuple[str, int], list[str]] = {}
    for layer in layers:
        third = -1 if layer.block is None else layer.block * THIRDS // blocks
        found.setdefault((layer.role, third), []).append(layer.name)
    return [[name for name in names if name in chosen] for names in found.values()]


def _in_context(
    problem: Problem, chosen: Mapping[str, int], names: Sequence[str], assembled: Assembled, now: float
) -> float:
    """What a change of these layers truly does, over what it was predicted to do."""
    moved = dict(chosen)
    for name in names:
        ways = problem.measured[name]
        better = [i for i, one in enumerate(ways) if one.error < ways[chosen[name]].error]
        worse = [i for i, one in enumerate(ways) if one.error > ways[chosen[name]].error]
        if better:
            moved[name] = max(better, key=lambda i: ways[i].error)
        elif worse:
            moved[name] = min(worse, key=lambda i: ways[i].error)
    predicted = problem.cost(moved) - problem.cost(chosen)
    if predicted == 0:
        return 1.0
    ratio = (assembled.divergence(moved) - now) / predicted
    return min(LIMIT, max(1 / LIMIT, ratio))
