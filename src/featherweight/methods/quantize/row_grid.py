"""Scalar grids whose rows are fitted without looking at other rows, so that a matrix is treated window by window."""

from __future__ import annotations

import abc
import math

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import (
    Fit,
    Grid,
    HeldWeight,
    SolveOptions,
    WeightSource,
    in_main_memory,
    nearest_levels,
)
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import groups_of

ROW_STATISTICS = ("fisher", "base")
"""Statistics with a row for every row of the weight."""


class RowGrid(Grid, abc.ABC):
    """A scalar grid fitted row by row, or strip by strip of `rows_together` neighbouring rows.

    All tensors of its fits have a row for each row of the weight in dimension 0.
    """

    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")

    @abc.abstractmethod
    def fit_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Fit:
        """`fit` with parameters stored as `dtype`, for all rows or a window of whole strips."""

    def rows_together(self, rows: int) -> int:
        """Rows that share parameters, in a matrix of `rows` rows."""
        return 1

    def solve_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> tuple[Fit, Tensor]:
        """Fit and indices of the levels taken, uint8 [out, in]; grids that find both at once override this."""
        fit = self.fit_rows(weight, dtype, statistics)
        return fit, nearest_levels(weight, self.levels(fit), self.group_size)

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        return self.fit_rows(weight, scale_dtype_for(self.scale_dtype, HeldWeight(weight).largest), statistics)

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        return self.quantize_source(HeldWeight(weight), SolveOptions(), statistics)

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        rows, _ = source.shape
        dtype = scale_dtype_for(self.scale_dtype, source.largest)
        step = self._window_rows(source.shape, options)
        indices = torch.empty(source.shape, dtype=torch.uint8, device="cpu")
        fits: list[Fit] = []
        for first in range(0, rows, step):
            last = min(rows, first + step)
            known = {n: t[first:last] if n in ROW_STATISTICS else t for n, t in statistics.items()}
            fit, indices[first:last] = self.solve_rows(source.rows(first, last).float(), dtype, known)
            fits.append(in_main_memory(fit))
            source.release(first, last)
        return self.encode(indices, {name: torch.cat([fit[name] for fit in fits]) for name in fits[0]})

    def _window_rows(self, shape: tuple[int, int], options: SolveOptions) -> int:
        return min(shape[0], options.window_rows(shape, 16, self.rows_together(shape[0])))

    def level_count(self) -> int:
        """Levels of a group."""
        raise TypeError(f"grid {self.kind!r} does not say how many levels a group has")

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = self._window_rows(shape, options)
        groups = groups_of(columns, self.group_size)
        # the sorted values with their running sums, a few float64 copies, levels and their middles
        fitting = window * (16 * 8 * columns + 3 * 8 * groups * self.level_count())
        return fitting + rows * (2 * columns + 16 * groups * max(2, math.ceil(math.log2(self.level_count()))))


def grouped(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Cut rows into groups, a short last one filled with zeros.

    Returns the values [out, groups, size] in the weight's dtype and where there are weights, bool [groups, size].
    """
    rows, columns = weight.shape
    size = min(group_size, columns)
    count = groups_of(columns, size)
    padded = torch.nn.functional.pad(weight, (0, count * size - columns)).view(rows, count, size)
    return padded, (torch.arange(count * size, device=padded.device) < columns).view(count, size)
