"""A share of the bytes is removed, unequally: of all sizes of all layers those whose errors add up to least.

ROCKET's budget (arXiv 2602.11008, steps 8 and 9). Every layer may get its grid in several sizes, or stay as it is; what
each misses is measured, and the multiple-choice knapsack over the bytes that are stored finds the choice of least
summed error, ||W - Q|| / ||W|| of each layer, alike for large and small ones, within what the share leaves. No layer
may miss much more than the mean layer would if all lost the same share: `cap` holds errors to alpha times that mean,
alpha the first of 1, 1.1, ..., 2 with which the share can be removed at all.

Codes are measured as the run would make them without data; with `errors: outputs`, or `calibrated` (codes with data,
errors of their weights, as the paper has it), by a file of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from featherweight.errors import RecipeError
from featherweight.methods.budget.base import Allocator, Candidate, LayerCandidates
from featherweight.methods.budget.knapsack import Option, solve
from featherweight.methods.quantize.choosing import with_settings
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register

WORD = 2  # bytes a weight of what is compared with
ALPHAS = tuple(1 + step / 10 for step in range(11))


@register("allocation", "knapsack")
class Knapsack(Allocator):
    """Of several sizes, to each layer that with which all together miss least (see the module)."""

    needs_errors: ClassVar[bool] = True

    removed: float = Field(0.3, gt=0, lt=1, description="share of the bytes saved in all, against 16 bits a weight")
    shares: tuple[float, ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), description="what a layer may lose, each with each of `kappas`"
    )
    kappas: tuple[float, ...] = Field((1.0, 1.5, 2.0, 3.0), description="what the grid's kappa may be")
    grids: tuple[dict[str, Any], ...] = Field(
        (), description="in place of shares and kappas: what each candidate changes in the recipe's grid"
    )
    untouched: bool = Field(True, description="a layer may also stay as it is, in bfloat16")
    cap: bool = Field(True, description="no layer misses more than the mean one would, by a growing factor")
    errors: Literal["weights", "calibrated", "outputs"] = Field(
        "weights",
        description="what is measured: weights of codes made without data; weights, or outputs, of codes made with the "
        "second moments in a statistics file",
    )

    @field_validator("shares", "kappas")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("name at least one")
        return value

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.errors == "weights" else ("gram",)

    @property
    def judges(self) -> Literal["weights", "outputs"]:
        return "outputs" if self.errors == "outputs" else "weights"

    def treatments(self, treatment: Treatment) -> tuple[Treatment, ...]:
        """Every size, and the layer as it is. RecipeError naming the setting that is wrong."""
        if self.grids:
            named = {f"allocation.grids[{place}]": dict(settings) for place, settings in enumerate(self.grids)}
        elif {"removed", "kappa"} <= set(type(treatment.grid).model_fields):
            named = {
                f"allocation, removed {share:g} and kappa {kappa:g}": {"removed": share, "kappa": kappa}
                for share in self.shares
                for kappa in self.kappas
            }
        else:
            raise RecipeError(
                f"the allocation knapsack does not know the sizes of the grid {treatment.grid.kind}: name them in "
                "allocation.grids, or take the grid factors"
            )
        found = [
            replace(treatment, grid=with_settings("grid", treatment.grid, settings, field))
            for field, settings in named.items()
        ]
        return (*found, *([Treatment(DenseGrid(dtype="bfloat16"), Nearest())] if self.untouched else []))

    def most_bytes(self, layers: Mapping[str, LayerCandidates]) -> int:
        return min(super().most_bytes(layers), self._budget(layers))

    def _budget(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Bytes for all layers. RecipeError where the smallest candidates take more."""
        weights = sum(layer.weights for layer in layers.values())
        budget = math.floor((1 - self.removed) * WORD * weights)
        least = sum(min(candidate.nbytes for candidate in layer.candidates) for layer in layers.values())
        if least > budget:
            raise RecipeError(
                f"allocation.removed is {self.removed:g}, but with the smallest size everywhere only "
                f"{1 - least / (WORD * max(1, weights)):.4f} of the bytes of these layers are removed: ask for less, "
                "or allow larger shares in allocation.shares"
            )
        return budget

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        budget, names = self._budget(layers), list(layers)
        items = {name: self._admitted(layer, math.inf) for name, layer in layers.items()}
        if self.cap:
            mean = self._mean_error(layers)
            for alpha in ALPHAS:
                capped = {name: self._admitted(layer, alpha * mean) for name, layer in layers.items()}
                if sum(min(one.nbytes for one in item) for item in capped.values()) <= budget:
                    items = capped
                    break
        found = solve([[Option(one.nbytes, one.miss) for one in items[name]] for name in names], budget)
        return {name: items[name][place].treatment for name, place in zip(names, found.chosen, strict=True)}

    def _mean_error(self, layers: Mapping[str, LayerCandidates]) -> float:
        """Of the best size of each layer that loses the share asked for, or of its smallest."""
        errors = []
        for layer in layers.values():
            room = (1 - self.removed) * WORD * layer.weights
            within = [one for one in layer.candidates if one.nbytes <= room]
            errors.append(min(map(_miss, within or [min(layer.candidates, key=lambda one: one.nbytes)])))
        return sum(errors) / max(1, len(errors))

    def _admitted(self, layer: LayerCandidates, most: float) -> list[_Size]:
        """The sizes that miss no more than that; the one that misses least where there is none."""
        sizes = [_Size(one.nbytes, _miss(one), one.treatment) for one in layer.candidates]
        return [one for one in sizes if one.miss <= most] or [min(sizes, key=lambda one: one.miss)]


@dataclass(frozen=True)
class _Size:
    """A candidate with the norm of what it misses, relative to the layer's."""

    nbytes: int
    miss: float
    treatment: Treatment


def _miss(candidate: Candidate) -> float:
    if candidate.error is None:
        raise ValueError("the knapsack chooses by measured errors, and this candidate has none")
    return math.sqrt(candidate.error)
