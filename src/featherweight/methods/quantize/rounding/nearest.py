"""Round to nearest: each weight to the allowed value closest to it, data-free."""

from __future__ import annotations

from typing import ClassVar

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, Rounding, SolveOptions, WeightSource
from featherweight.registry import register
from featherweight.storage.codes import Code


@register("rounding", "nearest")
class Nearest(Rounding):
    """The grid's own fit, then the nearest level; grids that do both at once (PTQTP) do so."""

    portable: ClassVar[bool] = True

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        return grid.quantize_source(source, options, statistics)
