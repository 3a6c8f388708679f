"""The transform that changes nothing."""

from __future__ import annotations

from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, unchanged
from featherweight.storage.codes import Code


class Identity:
    """The transform that changes nothing and wraps nothing."""

    key = "identity"
    portable = True

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
