"""The Hessian sweep (GPTQ, GPTAQ, ResComp, FOEM) as a rounding; see `featherweight.methods.quantize.sweep`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, Rounding, SolveOptions, WeightSource
from featherweight.methods.quantize.memo import Memo
from featherweight.methods.quantize.sweep import Sweeper, SweepResult, SweepSettings
from featherweight.methods.quantize.sweep_factor import Factor
from featherweight.methods.quantize.sweep_rows import RowFeedback
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.nested import index_dtype


@register("rounding", "hessian")
class Hessian(Rounding, SweepSettings):
    """Columns are rounded in turn, the error of each compensated in the rest under the inputs' second moment."""

    portable: ClassVar[bool] = True

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

    def solve(
        self,
        source: WeightSource,
        grid: Grid,
        statistics: Statistics,
        options: SolveOptions,
        rows: RowFeedback | None = None,
    ) -> SweepResult:
        """The sweep of a whole source, reusing the factorisation if the last layer had the same second moment."""
        weight = source.rows(0, source.shape[0]).float()
        result = _sweeper(statistics, self, options.memo).run(weight, grid, options, statistics, rows)
        source.release(0, source.shape[0])
        return result


@dataclass(frozen=True, eq=False)
class _Kept:
    """Factors of a second moment, and what they came from."""

    settings: Hessian
    moments: tuple[tuple[weakref.ref[Tensor], int] | None, ...]
    factors: dict[int, Factor]

    def fits(self, settings: Hessian, moments: list[Tensor | None]) -> bool:
        """Whether they are those of these very tensors, unchanged, with these settings."""
        same = [
            moment is None
            if kept is None
            else kept[0]() is moment and moment is not None and kept[1] == moment._version
            for moment, kept in zip(moments, self.moments, strict=True)
        ]
        return all(same) and settings == self.settings


def _sweeper(statistics: Statistics, settings: Hessian, memo: Memo) -> Sweeper:
    """A sweeper with the last factors if they are those asked for: layers that share an input come in turn.

    They are kept for as long as their second moment is in use elsewhere.
    """
    moments = [statistics.get(name) for name in ("gram", "cross")]
    kept = memo.latest
    if not isinstance(kept, _Kept) or not kept.fits(settings, moments):

        def forget(_: object) -> None:
            if memo.latest is kept:
                memo.latest = None

        refs = tuple(None if m is None else (weakref.ref(m, forget), m._version) for m in moments)
        kept = memo.latest = _Kept(settings, refs, {})
    return Sweeper(statistics, settings, kept.factors)
