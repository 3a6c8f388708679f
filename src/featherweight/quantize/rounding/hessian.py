"""The Hessian sweep (GPTQ, GPTAQ, ResComp, FOEM) as a rounding; see `featherweight.quantize.sweep`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from featherweight.codes import Code
from featherweight.codes.nested import index_dtype
from featherweight.quantize.base import Grid, Rounding, SolveOptions, Statistics, WeightSource
from featherweight.quantize.sweep import Sweeper, SweepResult, SweepSettings
from featherweight.quantize.sweep_factor import Factor
from featherweight.registry import register


@register("rounding", "hessian")
class Hessian(Rounding, SweepSettings):
    """Columns are rounded in turn, the error of each compensated in the rest under the inputs' second moment."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram", "cross") if self.needs_cross else ("gram",)

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        return shape[1] * index_dtype(shape[1]).itemsize if self.stores_order else 0

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
        result = _latest.sweeper(statistics, self).run(weight, grid, options, statistics)
        source.release(0, rows)
        return result


class _Latest:
    """Factors of the last second moment, as long as it is in use elsewhere: layers that share an input come in turn."""

    def __init__(self) -> None:
        self._moments: list[tuple[weakref.ref[Tensor], int] | None] = []
        self._settings: Hessian | None = None
        self._factors: dict[int, Factor] = {}

    def sweeper(self, statistics: Statistics, settings: Hessian) -> Sweeper:
        """A sweeper with the factors that are known for these very tensors, unchanged, and these settings."""
        moments = [statistics.get(name) for name in ("gram", "cross")]
        known = settings == self._settings and len(self._moments) == len(moments)
        for moment, kept in zip(moments, self._moments, strict=False):
            if moment is None or kept is None:
                known = known and moment is None and kept is None
            else:
                known = known and moment is kept[0]() and moment._version == kept[1]
        if not known:
            self._settings, self._factors = settings, {}
            self._moments = [None if m is None else (weakref.ref(m, self._forget), m._version) for m in moments]
        return Sweeper(statistics, settings, self._factors)

    def _forget(self, _: object) -> None:
        self._moments, self._settings, self._factors = [], None, {}


_latest = _Latest()
