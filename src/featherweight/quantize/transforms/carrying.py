"""How statistics of a layer's input become those of the transformed input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.codes import Code
from featherweight.quantize.base import Statistics

Map = Callable[[Tensor], Tensor]

GRAMS = ("gram", "held_out_gram")
MOMENTS = (*GRAMS, "cross")


def symmetric(moment: Tensor) -> Tensor:
    """The moment [in, in] itself if it equals its transpose in every bit, else (M + M') / 2, which does.

    Products leave the two triangles apart by rounding, by how much depends on the BLAS. What is symmetric is not
    copied: factors are kept for the very tensor they were made from.
    """
    return moment if torch.equal(moment, moment.mT) else (moment + moment.mT) / 2


def unchanged(statistics: Statistics) -> dict[str, Tensor]:
    """What calibration learned about an input that stays as it is; second moments exactly symmetric."""
    return {name: symmetric(value) if name in GRAMS else value for name, value in statistics.items()}


def carried(statistics: Statistics, inputs: Map, weights: Map, **others: Map | None) -> dict[str, Tensor]:
    """What calibration would have learned about T x; second moments exactly symmetric.

    inputs : T x for [..., in]
    weights : W T^-1 for [out, in]
    others : how `fisher` and `mean_abs` change; what has no map is dropped, but the mean |T x| of the sampled
        `inputs` stands in for `mean_abs`
    """
    kept: dict[str, Tensor] = {}
    for name, value in statistics.items():
        if name in MOMENTS:
            moment = inputs(inputs(value).mT.contiguous()).mT.contiguous()
            kept[name] = symmetric(moment) if name in GRAMS else moment
        elif name in ("mean", "inputs"):
            kept[name] = inputs(value)
        elif name == "base":
            kept[name] = weights(value)
        elif name == "tokens":
            kept[name] = value
        elif (change := others.get(name)) is not None:
            kept[name] = change(value)
        elif name == "mean_abs" and "inputs" in statistics:
            kept[name] = inputs(statistics["inputs"]).abs().mean(0)
    return kept


class Identity:
    """The transform that changes nothing and wraps nothing."""

    key = "identity"

    def apply(self, weight: Tensor) -> Tensor:
        return weight

    def invert(self, weight: Tensor) -> Tensor:
        return weight

    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        return unchanged(statistics)

    def wrap(self, code: Code) -> Code:
        return code
