"""Rounding with feedback from both sides: YAQA (ICML 2026), the Hessian sweep under a Kronecker product H_O (x) H_I.

Reconstructed from formulas alone; the paper's tables and its program were not looked at. With E = W - Q of what is
already rounded, each weight is rounded from W + M_O' E M_I + M_O' E + E M_I, M the unit triangular factor of a second
moment without its diagonal; sweep_rows.py has the derivation. The paper writes it with lower factors, from the bottom
right corner in tiles of 16 x 16; here, as in the one-sided sweep, factors are upper and weights go from the top left.

* H_I is the statistic `gram`, H_O `output_gram`, both of one guided pass; each is damped by itself.
* A diagonal H_O gives the codes of the rounding `hessian`: only what correlates rows' gradients changes a code.
* `tile: 1` is exact. A larger tile rounds that many rows as if they were independent, under block factors, as the
  published tiles do; columns are exact in any case.
* H_O wants many sequences. Of 24 windows of 64 tokens (SmolLM2-135M, two of 30 blocks, 3 bits) it made things worse:
  divergence .050 with `output_order: activation`, .039 with `output_damping: 0.1` as well, .033 one-sided.
* A group's scales are fitted as the sweep reaches it, to weights that have taken up errors of columns, not yet of rows.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, Rounding, SolveOptions, WeightSource
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.sweep_factor import FactorSettings
from featherweight.methods.quantize.sweep_rows import RowFeedback
from featherweight.registry import register
from featherweight.storage.codes import Code

NEEDED = "it rounds single weights to levels, so it needs a grid that has a list of them"


@register("rounding", "two-sided")
class TwoSided(Rounding, FactorSettings):
    """A Hessian sweep that hands errors on between rows, too, under second moments of inputs and output gradients."""

    portable: ClassVar[bool] = False  # row by row, which keeps a device waiting
    groups: Literal["dynamic", "static"] = Field(
        "dynamic", description="grids fitted to compensated weights on the way, or to the original ones beforehand"
    )
    block_size: int = Field(128, ge=1, description="columns between updates of the whole rest; changes speed only")
    output_damping: float = Field(0.01, ge=0, description="added to the diagonal of H_O, as a share of its mean")
    output_order: Literal["none", "activation"] = Field(
        "none", description="rows as they are, or by falling diagonal of H_O; nothing is stored"
    )
    tile: int = Field(1, ge=1, description="rows that are rounded without feedback between them; 1: exact")

    @model_validator(mode="after")
    def _order_goes_with_the_rest(self) -> TwoSided:
        if self.order == "similarity" and self.groups == "static":
            raise ValueError("order similarity makes groups on the way: set groups to dynamic")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram", "output_gram")

    @cached_property
    def one_sided(self) -> Hessian:
        """The sweep over columns, which this one is under a diagonal H_O."""
        shared = {name: getattr(self, name) for name in FactorSettings.model_fields}
        return Hessian(**shared, groups=self.groups, block_size=self.block_size)

    def refusal(self, grid: Grid) -> str | None:
        return NEEDED if grid.columns_jointly > 1 or type(grid).levels is Grid.levels else None

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        return self.one_sided.extra_bytes(shape)

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        return self.quantize_reported(source, grid, statistics, options)[0]

    def quantize_reported(
        self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions
    ) -> tuple[Code, dict[str, Any]]:
        """RecipeError where the grid has no levels, or `output_gram` is missing or cannot be used.

        Without `gram` and where it is of no use, the grid is rounded to without data, as in the one-sided sweep.
        """
        if self.refusal(grid) is not None:
            raise RecipeError(f"rounding two-sided: {NEEDED}, not {grid.kind!r}")
        rows = self._rows(statistics, source.shape[0]) if "gram" in statistics else None
        result = self.one_sided.solve(source, grid, statistics, options, rows)
        report = result.report()
        if rows is None:
            return result.code, report if result.data_free else report | {"output_gram": "zero: rounded one-sidedly"}
        report["output_damping"] = rows.damping
        return result.code, report | ({"output_note": rows.note} if rows.note else {})

    def _rows(self, statistics: Statistics, rows: int) -> RowFeedback | None:
        """The feedback between rows; None where no gradient reached them."""
        output_gram: Tensor | None = statistics.get("output_gram")
        if output_gram is None:
            raise RecipeError(
                "rounding two-sided needs the statistic output_gram, which was not gathered: take a calibration with a "
                "guided backward pass, or the rounding hessian"
            )
        if output_gram.shape != (rows, rows):
            raise RecipeError(
                f"the statistic output_gram is {list(output_gram.shape)}, but the weight has {rows} rows: it belongs "
                "to another layer"
            )
        if not bool(output_gram.any()):
            return None
        settings = self.one_sided.model_copy(update={"damping": self.output_damping})
        return RowFeedback.of(output_gram, settings, self.output_order, self.tile)
