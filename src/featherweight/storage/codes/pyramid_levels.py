"""Amplitude levels of pyramid codes: quantisers adapted to the energy share of one group in an isotropic row.

PVQ (arXiv 2410.16926), step 4 of its reconstruction: with a the norm of a group of D weights and r that of its row of n
weights, (a / r)^2 follows Beta(D / 2, (n - D) / 2). The levels depend on (D, n, bits) alone and are stored nowhere, so
they must come out the same on every machine: this module uses nothing but correctly rounded operations (+, -, *, /,
square root) in a fixed order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

LevelRule = Literal["lloyd-max", "cdf"]

CELLS = 8192
SPREAD = 12  # standard deviations of the amplitude on either side that are tabulated
ROUNDS = 2000
SETTLED = 1e-13


class Levels(NamedTuple):
    """Amplitudes as shares of the row norm: ascending `values`, and the `limits` between neighbouring ones."""

    values: tuple[float, ...]
    limits: tuple[float, ...]


class Law(NamedTuple):
    """The distribution of the share s = a / r, tabulated in CELLS cells of equal width from `low`."""

    low: float
    width: float
    mass: list[float]  # [CELLS + 1], P(s <= low + i width)
    moment: list[float]  # [CELLS + 1], E[s; s <= low + i width]

    def cumulative(self, share: float) -> float:
        """P(s <= share)."""
        return self._interpolate(self.mass, share)

    def quantile(self, probability: float) -> float:
        """The share with P(s <= share) = probability."""
        cell = min(max(bisect_right(self.mass, probability) - 1, 0), CELLS - 1)
        inside = self.mass[cell + 1] - self.mass[cell]
        part = (probability - self.mass[cell]) / inside if inside > 0 else 0.5
        return self.low + (cell + min(max(part, 0.0), 1.0)) * self.width

    def mean(self, first: float, last: float) -> float:
        """E[s | first < s <= last]; the middle where nothing lies there."""
        mass = self.cumulative(last) - self.cumulative(first)
        if mass <= 0:
            return (first + last) / 2
        moment = self._interpolate(self.moment, last) - self._interpolate(self.moment, first)
        return min(max(moment / mass, first), last)

    def _interpolate(self, table: list[float], share: float) -> float:
        place = min(max((share - self.low) / self.width, 0.0), float(CELLS))
        cell = min(int(place), CELLS - 1)
        return table[cell] + (place - cell) * (table[cell + 1] - table[cell])


@lru_cache(maxsize=64)
def share_law(group_size: int, columns: int) -> Law:
    """The law of a / r for groups of D = `group_size` in rows of n = `columns` > D: s^2 ~ Beta(D / 2, (n - D) / 2)."""
    typical = group_size / columns  # mean of s^2
    reach = SPREAD / math.sqrt(2 * columns)
    low, high = max(0.0, math.sqrt(typical) - reach), min(1.0, math.sqrt(typical) + reach)
    width = (high - low) / CELLS
    middles = [low + (i + 0.5) * width for i in range(CELLS)]
    # Density s^(D-1) (1 - s^2)^((n-D)/2 - 1), each factor relative to its value near the peak.
    density = [
        _half_power(s * s / typical, group_size - 1)
        * _half_power((1.0 - s * s) / (1.0 - typical), columns - group_size - 2)
        for s in middles
    ]
    mass = [0.0, *accumulate(density)]
    moment = [0.0, *accumulate(d * s for d, s in zip(density, middles, strict=True))]
    return Law(low, width, [m / mass[-1] for m in mass], [m / mass[-1] for m in moment])


@lru_cache(maxsize=256)
def amplitude_levels(group_size: int, columns: int, bits: int, rule: LevelRule) -> Levels:
    """The 2^bits amplitude levels of a row of `columns` weights in groups of `group_size`.

    lloyd-max: least mean squared error of a / r; cdf: cells of equal probability with their medians. A row that is one
    group has the share 1 always. Values are rounded to 20 bits, well above what the table resolves.
    """
    count = 1 << bits
    if columns <= group_size:
        return Levels((1.0,) * count, (1.0,) * (count - 1))
    law = share_law(group_size, columns)
    values = [law.quantile((i + 0.5) / count) for i in range(count)]
    limits = [law.quantile(i / count) for i in range(1, count)]
    if rule == "lloyd-max":
        values = _settle(values, law.mean, law.low, law.low + CELLS * law.width)
    values = [math.floor(v * 1048576.0 + 0.5) / 1048576.0 for v in values]
    if rule == "lloyd-max":
        limits = _middles(values)
    return Levels(tuple(values), tuple(limits))


def _settle(values: list[float], mean: Callable[[float, float], float], low: float, high: float) -> list[float]:
    """Lloyd's iteration: each level the mean of its cell, each limit the middle of two levels."""
    for _ in range(ROUNDS):
        edges = [low, *_middles(values), high]
        moved = [mean(first, last) for first, last in zip(edges, edges[1:], strict=False)]
        change = max(abs(new - old) for new, old in zip(moved, values, strict=True))
        values = moved
        if change < SETTLED:
            break
    return values


def _middles(values: list[float]) -> list[float]:
    return [(first + last) / 2 for first, last in zip(values, values[1:], strict=False)]


def _half_power(base: float, twice: int) -> float:
    """base^(twice / 2) by square root and repeated squaring, which round the same everywhere."""
    root = math.sqrt(base)
    if twice < 0:
        return 1.0 / _half_power(base, -twice)
    result = 1.0
    while twice:
        if twice & 1:
            result *= root
        root *= root
        twice >>= 1
    return result
