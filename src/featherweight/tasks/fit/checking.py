"""How far the linear model of the divergence holds: predicted against measured, on choices it was not fitted to.

    KL(choice) ~ a * sum_l s_l e_l(c_l)

Choices of random ways, from nearly lossless to coarse, are put together and their true divergence taken. `a` is the
geometric mean of measured over predicted on every second one; on the others R^2 of the logarithms and the median
relative error are stated. Pairs of layers, changed together and each by itself, say how much of what is missed is that
errors of two layers meet: together / (one + other), 1 where they add up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.tasks.fit.choosing import Problem
from featherweight.tasks.fit.curves import Curves
from featherweight.tasks.fit.measures.base import Asked
from featherweight.tasks.fit.sensitivity import Network

PAIRS = 6
"""Pairs of layers that are changed together."""


@dataclass(frozen=True)
class Pair:
    """Two layers, and the divergences of changing each (summed) and both, nats a token."""

    layers: tuple[str, str]
    apart: float
    together: float


@dataclass(frozen=True)
class LinearModel:
    """How well sums predict.

    scale : a, measured over predicted; r2, relative_error : on the choices that `scale` was not taken from, of
        logarithms, and the median of |a * predicted - measured| / measured
    points : predicted (without a) and measured divergence of each choice
    pairs : see `Pair`; interaction : the median of together over apart; None without pairs
    """

    scale: float
    r2: float
    relative_error: float
    points: tuple[tuple[float, float], ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def interaction(self) -> float | None:
        return median(pair.together / pair.apart for pair in self.pairs) if self.pairs else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interaction": self.interaction}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LinearModel:
        """The inverse of `to_json`."""
        pairs = tuple(Pair((p["layers"][0], p["layers"][1]), p["apart"], p["together"]) for p in found["pairs"])
        points = tuple((float(a), float(b)) for a, b in found["points"])
        return cls(found["scale"], found["r2"], found["relative_error"], points, pairs)


def check_linear(
    problem: Problem, asked: Asked, count: int, seed: int, told: Callable[[int, int], None]
) -> LinearModel | None:
    """Measure `count` random choices (four at least are needed, else None) and PAIRS pairs.

    told : called with the passes that are done, and all
    """
    network = asked.network
    if network is None or count < 4:
        return None
    draw = random.Random(seed)
    points, number = [], 0
    for choice in random_choices(problem, count, draw):
        told(number, count + 3 * PAIRS)
        number += 1
        weights = {n: _decoded(asked.curves, n, place) for n, place in choice.items()}
        points.append((problem.cost(choice), network.divergence(weights)))
    pairs = []
    layers = [layer for layer in asked.layers if layer.block is not None]
    for _ in range(PAIRS if len(layers) > 1 else 0):
        told(number, count + 3 * PAIRS)
        number += 3
        pairs.append(_pair(network, asked, draw.sample(layers, 2)))
    told(count + 3 * PAIRS, count + 3 * PAIRS)
    return fitted(points, [pair for pair in pairs if pair.apart > 0])


def _decoded(curves: Curves, name: str, place: int) -> Any:
    return curves.code(curves.measured[name][place]).decode()


def _pair(network: Network, asked: Asked, two: Sequence[LinearLayer]) -> Pair:
    weights = {layer.name: asked.curves.code(asked.typical(layer)).decode() for layer in two}
    alone = [network.divergence({x.name: weights[x.name]}, network.first_block([x])) for x in two]
    return Pair((two[0].name, two[1].name), sum(alone), network.divergence(weights, network.first_block(two)))


def random_choices(problem: Problem, count: int, draw: random.Random) -> list[dict[str, int]]:
    """Choices from nearly lossless to coarse: in each, a layer goes a random one of the ways that take at least a share
    of what its largest way takes; the share falls from choice to choice."""
    found = []
    for number in range(count):
        share = 0.8 - 0.6 * number / max(1, count - 1)
        choice = {}
        for group in problem.groups:
            ways = problem.measured[group[0]]
            most = max(one.nbytes for one in ways)
            place = draw.choice([p for p, one in enumerate(ways) if one.nbytes >= share * most])
            choice.update(dict.fromkeys(group, place))
        found.append(choice)
    return found


def fitted(points: Sequence[tuple[float, float]], pairs: Sequence[Pair] = ()) -> LinearModel | None:
    """The scale from every second point, checked on the others; None where fewer than two of each are above zero."""
    usable = [(p, m) for p, m in points if p > 0 and m > 0]
    own, others = usable[::2], usable[1::2]
    if len(own) < 2 or len(others) < 2:
        return None
    shift = sum(math.log(m / p) for p, m in own) / len(own)
    measured = [math.log(m) for _, m in others]
    mean = sum(measured) / len(measured)
    missed = sum((math.log(p) + shift - math.log(m)) ** 2 for p, m in others)
    spread = sum((value - mean) ** 2 for value in measured)
    relative = median(abs(math.exp(shift) * p - m) / m for p, m in others)
    return LinearModel(math.exp(shift), 1 - missed / spread if spread else 0.0, relative, tuple(points), tuple(pairs))
