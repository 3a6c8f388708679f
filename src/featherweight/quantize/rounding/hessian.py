"""The Hessian sweep (GPTQ, GPTAQ, ResComp, FOEM) as a rounding; see `featherweight.quantize.sweep`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from featherweight.codes import Code
from featherweight.quantize.base import Grid, Rounding, SolveOptions, Statistics, WeightSource
from featherweight.quantize.sweep import Sweeper, SweepResult, SweepSettings
from featherweight.registry import register


@register("rounding", "hessian")
class Hessian(Rounding, SweepSettings):
    """Columns are rounded in turn, the error of each compensated in the rest under the inputs' second moment."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram", "cross") if self.needs_cross else ("gram",)

    def sweeper(self, statistics: Statistics) -> Sweeper:
        """A sweeper for all layers with these statistics."""
        return Sweeper(statistics, self)

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        return self.solve(source, grid, statistics, options).code

    def quantize_reported(
        self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions
    ) -> tuple[Code, dict[str, Any]]:
        result = self.solve(source, grid, statistics, options)
        return result.code, result.report()

    def solve(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> SweepResult:
        """The sweep of a whole source, reusing the factorisation if the last layer had the same second moment."""
        rows = source.shape[0]
        weight = source.rows(0, rows).float()
        result = _latest.get(statistics, self).run(weight, grid, options, statistics)
        source.release(0, rows)
        return result


class _Latest:
    """The last sweeper, as long as its second moment is in use elsewhere: layers that share an input come in turn."""

    def __init__(self) -> None:
        self._gram: weakref.ref[Tensor] | None = None
        self._sweeper: Sweeper | None = None

    def get(self, statistics: Statistics, settings: Hessian) -> Sweeper:
        gram = statistics.get("gram")
        if gram is None:
            return Sweeper(statistics, settings)
        known = self._sweeper
        if known is not None and self._gram is not None and self._gram() is gram and known.settings == settings:
            same_cross = known.statistics.get("cross") is statistics.get("cross")
            if same_cross:
                return known
        self._gram = weakref.ref(gram, lambda _: self._forget())
        self._sweeper = Sweeper(statistics, settings)
        return self._sweeper

    def _forget(self) -> None:
        self._sweeper = None


_latest = _Latest()
