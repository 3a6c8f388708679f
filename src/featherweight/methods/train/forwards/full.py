"""Weights as they are: the control that everything else is compared with, trained by the same loop."""

from __future__ import annotations

from torch import Tensor

from featherweight.methods.train.base import Forward, Rounded
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense


@register("forward", "full")
class Full(Forward):
    """No rounding at all (see the module): layers stay what they are."""

    zero = False
    edges = False

    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        return Rounded(weight.detach(), weight.detach(), weight.new_ones(weight.shape[0], 1))

    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        return Dense(weight.detach().cpu())
