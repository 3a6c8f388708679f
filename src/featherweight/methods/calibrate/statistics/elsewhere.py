"""Statistics of a layer that no pass over a block gives.

fisher         [out, in]   mean squared gradients of the loss (`WholeModel.fisher`)
output_gram    [out, out]  H_O of YAQA: mean over sequences of G G' / in, G = sum_t g_t x_t' (a guided backward pass)
base           [out, in]   the weight that the model was fine-tuned from
update_range   [3]         how far all weights of the model are from those
"""

from __future__ import annotations

from torch import Tensor

from featherweight.methods.calibrate.statistics.base import Basis, Statistic, Statistics
from featherweight.registry import register


@register("statistic", "fisher")
class Fisher(Statistic):
    axes = ("out", "in")
    gathered = False
    stored = False
    of_layer = True


@register("statistic", "output_gram")
class OutputGram(Statistic):
    """float32, symmetric; beside it `gram` is H_I of the same pass. Gradients at outputs know no basis of the input."""

    axes = ("out", "out")
    gathered = False
    stored = False
    of_layer = True

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return value


@register("statistic", "base")
class BaseWeight(Statistic):
    axes = ("out", "in")
    gathered = False
    stored = False
    of_layer = True

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return basis.weights(value)


@register("statistic", "update_range")
class UpdateRange(Statistic):
    axes = ()
    gathered = False
    stored = False
