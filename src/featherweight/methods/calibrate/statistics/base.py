"""What a statistic is: dimensions, how tokens enter it, what becomes of it in another basis.

All are float32 means over tokens, weighted by token weights w where the settings ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from featherweight.registry import nearest, registered

Statistics = Mapping[str, Tensor]
"""What calibration learned about a layer's input, by name."""

NO_STATISTICS: Statistics = {}

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Some tokens that enter a layer.

    given : [n, in], as the network has them
    weights : [n], or None where all count alike
    difference : how far the full-precision stream is from them [n, in], where it is known
    old, new : a running mean becomes old * mean + new * (weighted sum of these tokens)
    """

    given: Tensor
    weights: Tensor | None
    difference: Tensor | None
    old: float
    new: float

    @cached_property
    def inputs(self) -> Tensor:
        """float32 [n, in]"""
        return self.given.float()

    @property
    def pairs(self) -> bool:
        """Whether they are numbers in bfloat16 in main memory: see native/moments.py."""
        return self.given.dtype == torch.bfloat16 and self.given.device.type == "cpu"

    @cached_property
    def rooted(self) -> Tensor:
        """bfloat16 inputs times the roots of their weights, whose products with each other are weighted; rounded again
        where there are weights."""
        return self.given if self.weights is None else (self.inputs * self.weights.sqrt()[:, None]).bfloat16()

    @cached_property
    def weighted(self) -> Tensor:
        """inputs times weights."""
        return self.inputs if self.weights is None else self.inputs * self.weights[:, None]


class Running:
    """A statistic while it is gathered.

    weighs : whether only tokens of some weight count; where it does not, those that were merely seen make it
    """

    weighs: ClassVar[bool] = True

    def see(self, inputs: Tensor) -> None:
        """Every token [n, in] that methods may see, as the network has it, whatever it weighs."""

    def add(self, tokens: Tokens) -> None:
        """Tokens that count."""

    def finish(self) -> Tensor:
        """The statistic; nothing is added after that."""
        raise NotImplementedError


@dataclass(frozen=True)
class Basis:
    """A change of basis of a layer's input: y = W x = (W T^-1)(T x).

    inputs : T x for [..., in]
    weights : W T^-1 for [out, in]
    others : how statistics change that neither map gives, by name
    """

    inputs: Map
    weights: Map
    others: Mapping[str, Map | None] = field(default_factory=dict)


class Statistic:
    """One statistic; see the classes registered on the axis "statistic".

    kind : its name
    axes : what its dimensions count: "in" (input columns), "out" (rows of the layer), "tokens"; those without "in"
        belong to the layer as a whole, and windows of columns share them
    gathered : whether a pass over a block gives it; else it comes from the whole model or another checkpoint
    stored : whether statistics files may hold it: only what the original network alone has
    held_out : whether it is of windows that enter nothing else
    two_streams : whether it compares the compressed network's stream with the original's
    of_layer : whether it belongs to one layer, not to all that share an input
    """

    kind: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    gathered: ClassVar[bool] = True
    stored: ClassVar[bool] = True
    held_out: ClassVar[bool] = False
    two_streams: ClassVar[bool] = False
    of_layer: ClassVar[bool] = False

    def start(self, in_features: int, device: torch.device) -> Running:
        """Begin to gather it."""
        raise TypeError(f"no pass over a block gives the statistic {self.kind!r}")

    def unchanged(self, value: Tensor) -> Tensor:
        """The statistic where the basis stays; second moments exactly symmetric."""
        return value

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        """What it would be of T x; None where that cannot be known."""
        change = basis.others.get(self.kind)
        return None if change is None else change(value)


def known_statistics() -> dict[str, Statistic]:
    """All statistics by name."""
    return {name: cast(Any, found)() for name, found in registered("statistic").items()}


def gathered_names() -> tuple[str, ...]:
    """Names of those that a pass over a block gives."""
    return tuple(name for name, statistic in known_statistics().items() if statistic.gathered)


def statistic_named(name: str) -> Statistic:
    """ValueError where there is none of that name."""
    found = registered("statistic").get(name)
    if found is None:
        known = registered("statistic")
        raise ValueError(
            f"there is no statistic called {name!r}{nearest(name, known)}; known are {', '.join(known)}; a new one is "
            "a class in featherweight.methods.calibrate.statistics"
        )
    return cast(Statistic, cast(Any, found)())


def restricted(statistics: Statistics, first: int, last: int) -> dict[str, Tensor]:
    """The statistics of input columns first to last - 1 alone; as views. See `of_columns`."""
    return of_columns(statistics, slice(first, last))


def of_columns(statistics: Statistics, columns: slice | Tensor) -> dict[str, Tensor]:
    """The statistics of some input columns, in any order. ValueError for one that is not known."""
    kept: dict[str, Tensor] = {}
    for name, value in statistics.items():
        for dimension, axis in enumerate(statistic_named(name).axes):
            if axis == "in":
                value = value[(slice(None),) * dimension + (columns,)]
        kept[name] = value
    return kept


def unchanged(statistics: Statistics) -> dict[str, Tensor]:
    """What calibration learned about an input that stays as it is; second moments exactly symmetric."""
    return {name: statistic_named(name).unchanged(value) for name, value in statistics.items()}


def carried(statistics: Statistics, inputs: Map, weights: Map, **others: Map | None) -> dict[str, Tensor]:
    """What calibration would have learned about T x; see `Basis`. What cannot be known is left out."""
    basis = Basis(inputs, weights, others)
    kept = {name: statistic_named(name).carry(value, basis, statistics) for name, value in statistics.items()}
    return {name: value for name, value in kept.items() if value is not None}
