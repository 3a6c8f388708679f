"""How statistics of a layer's input become those of the transformed input."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from featherweight.codes import Code
from featherweight.quantize.base import Statistics

Map = Callable[[Tensor], Tensor]

MOMENTS = ("gram", "cross", "held_out_gram")


def carried(statistics: Statistics, inputs: Map, weights: Map, **others: Map | None) -> dict[str, Tensor]:
    """What calibration would have learned about T x.

    inputs : T x for [..., in]
    weights : W T^-1 for [out, in]
    others : how `fisher` and `mean_abs` change; what has no map is dropped, but the mean |T x| of the sampled
        `inputs` stands in for `mean_abs`
    """
    kept: dict[str, Tensor] = {}
    for name, value in statistics.items():
        if name in MOMENTS:
            moment = inputs(inputs(value).mT.contiguous()).mT.contiguous()
            kept[name] = moment if name == "cross" else (moment + moment.mT) / 2  # rounding left it not quite symmetric
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
        return dict(statistics)

    def wrap(self, code: Code) -> Code:
        return code
