"""AdaDim: groups along the inputs of a row or along the outputs of a column, whichever misses less of the output.

Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization (arXiv 2309.15531). Activation
outliers live in single input channels; groups inside a column keep the scales of such a column apart. Layer by layer in
the model's order, both groupings are tried by round to nearest, and the one with the smaller squared difference of the
inspected output wins: that of the whole attention for q, k, v, of the whole MLP for gate and up, of the layer itself
for o and down; a tie keeps the rows' groups. Layers decided before are in place, quantised, on both sides of the
comparison. Then the layer is rounded: to nearest (RTN-ada) or by the Hessian sweep in the grouping chosen (GPTQ-ada).

Where this departs: the uniform grid keeps zero inside every range (the published one clips groups without a change of
sign); `keep: better` compares the sweep with round to nearest on the layer's own output, where the published code
installs the sweep's weights in any case. Layers whose outputs do not divide into groups keep the rows' groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, HeldWeight, Rounding, Scope, SolveOptions, WeightSource
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.scale_search import capture, common_parent, first_tensor, layer_loss, submodule
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.permuted import Permuted, inverse_order
from featherweight.storage.codes.uniform import Uniform

Axis = Literal["input", "output"]


NEEDED = "it chooses the axis of a uniform grid along the input"


@register("rounding", "adadim")
class AdaDim(Rounding):
    """Choose the axis of groups layer by layer, then round (see the module)."""

    scope: ClassVar[Scope] = "block"

    rounding: Literal["nearest", "hessian"] = Field("nearest", description="RTN-ada, or GPTQ-ada")
    search_tokens: int | None = Field(16384, ge=1, description="tokens that modules are run on; null: all")
    keep: Literal["sweep", "better"] = Field(
        "sweep", description="GPTQ-ada: the sweep's code, or the better of the two"
    )
    damping: float = Field(0.01, ge=0, description="GPTQ-ada: share of the mean diagonal that is added to it")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.rounding == "hessian" else ()

    def refusal(self, grid: Grid) -> str | None:
        return None if isinstance(grid, UniformGrid) and grid.axis == "input" else NEEDED

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        """Without a block to look at: round to nearest along the rows."""
        return grid.quantize_source(source, options, statistics)

    def quantize_block(
        self,
        session: BlockAccess,
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        options: SolveOptions,
        notify: Observer = silent,
        seed: int = 0,
    ) -> dict[str, Code]:
        codes: dict[str, Code] = {}
        decided: dict[str, Tensor] = {}
        for name in grids:
            grid = _uniform(grids[name], name)
            weight = session.weight(name)
            trials: dict[Axis, tuple[UniformGrid, Code]] = {"input": (grid, grid.quantize(weight))}
            by_column = along_outputs(grid, weight.shape[0])
            if by_column is not None:
                trials["output"] = (by_column, by_column.quantize(weight))
            errors = self._errors(session, name, decided, {axis: code.decode() for axis, (_, code) in trials.items()})
            axis: Axis = "output" if errors.get("output", torch.inf) < errors["input"] else "input"
            notify({"event": "adadim", "layer": name, "axis": axis, **{f"error_{a}": e for a, e in errors.items()}})
            chosen, code = trials[axis]
            codes[name] = self._swept(weight, chosen, code, statistics.get(name, {}), options)
            decided[name] = codes[name].decode()
        return codes

    def _errors(
        self, session: BlockAccess, name: str, decided: Mapping[str, Tensor], trials: Mapping[Axis, Tensor]
    ) -> dict[Axis, float]:
        """Mean squared difference of the inspected output for each trial."""
        group = next(list(g) for g in session.groups if name in g)
        module = common_parent(session, group) if len(group) > 1 else submodule(session, name)
        with session.overridden(decided):
            calls = capture(session, module, self.search_tokens)
        errors: dict[Axis, float] = {}
        for axis, trial in trials.items():
            total, count = 0.0, 0
            with torch.no_grad(), session.overridden({**decided, name: trial}):
                for args, kwargs, expected in calls:
                    difference = first_tensor(module(*args, **kwargs)).float() - expected
                    total += float(difference.square().sum(dtype=torch.float64))
                    count += expected.numel()
            errors[axis] = total / max(1, count)
        return errors

    def _swept(
        self, weight: Tensor, grid: UniformGrid, nearest: Code, statistics: Statistics, options: SolveOptions
    ) -> Code:
        if self.rounding == "nearest" or "gram" not in statistics:
            return nearest
        groups: Literal["static", "dynamic"] = "static" if grid.axis == "input" else "dynamic"
        sweep = Hessian(order="activation", groups=groups, damping=self.damping)
        code = in_order(sweep.quantize_source(HeldWeight(weight), grid, statistics, options))
        if self.keep == "sweep":
            return code
        loss = layer_loss({"w": weight}, statistics["gram"].float())
        return code if loss({"w": code.decode()}) <= loss({"w": nearest.decode()}) else nearest


def along_outputs(grid: UniformGrid, rows: int) -> UniformGrid | None:
    """The same grid with its groups inside columns; None where they do not divide the rows."""
    if rows % grid.group_size:
        return None
    return grid.model_copy(update={"axis": "output", "output_group_size": grid.group_size, "group_size": 1})


def in_order(code: Code) -> Code:
    """Without the permutation that a sweep in another order leaves, which groups inside columns can spare."""
    if not isinstance(code, Permuted) or not isinstance(code.inner, Uniform) or code.inner.axis != "output":
        return code
    inner, order = code.inner, inverse_order(code.order)
    codes, zero_points = (t[:, order] for t in inner.unpack())
    stored = None if inner.zero_points is None else zero_points
    scales = inner.scales[:, order]
    return Uniform.encode(codes, scales, stored, inner.bits, inner.group_size, scale_dtype=scales.dtype, axis="output")


def _uniform(grid: Grid, name: str) -> UniformGrid:
    if not isinstance(grid, UniformGrid) or grid.axis != "input":
        raise RecipeError(f"rounding adadim cannot round {name}: {NEEDED}")
    return grid
