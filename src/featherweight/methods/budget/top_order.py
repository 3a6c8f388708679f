"""Two grids, and the finer one for the most important blocks (layer-wise quantisation, arXiv 2406.17415).

Blocks stand in the order of a score, and the first of them, as many as make up a share of all weights, get the finer
grid; the others keep the recipe's. The score is LIM (what a block changes of its input; needs text), or ZD (how few of
its weights stand out; needs none); see `importance`. With n of L blocks alike and b_hi and b_lo bits the mean is
b_lo + (b_hi - b_lo) n / L: for a mean of B the share is (B - b_lo) / (b_hi - b_lo). Random and reversed orders are
controls. Layers outside the blocks, and those whose grid an override names, stay as the recipe has them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from featherweight.methods.budget.base import Allocator, LayerCandidates
from featherweight.methods.quantize.choosing import with_settings
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register


@register("allocation", "top-order")
class TopOrder(Allocator):
    """The recipe's grid, and a finer one for the blocks that a score puts first (see the module)."""

    grid: dict[str, Any] = Field(
        ..., description="what important blocks get in place of the recipe's grid's settings; with a kind, another grid"
    )
    share: float = Field(0.5, ge=0, le=1, description="of the blocks' weights, that get the finer grid")
    score: Literal["lim", "zd", "random"] = Field(
        "lim", description="what blocks are ordered by: lim needs text, zd weights alone, random is a control"
    )
    reverse: bool = Field(False, description="least important blocks first: a control")
    seed: int = Field(0, description="of the random order")
    threshold: float = Field(1.0, gt=0, description="zd: deviations above the mean from which weights stand out")
    two_sided: bool = Field(False, description="zd: weights far below the mean stand out, too")

    @property
    def importance(self) -> str | None:
        return None if self.score == "random" else self.score

    def treatments(self, treatment: Treatment) -> tuple[Treatment, ...]:
        """The recipe's own, and that with the finer grid. RecipeError naming the setting that is wrong."""
        return treatment, replace(treatment, grid=with_settings("grid", treatment.grid, self.grid, "allocation.grid"))

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        first = self._first(layers)
        return {
            name: x.candidates[-1 if x.layer is not None and x.layer.block in first else 0].treatment
            for name, x in layers.items()
        }

    def _first(self, layers: Mapping[str, LayerCandidates]) -> set[int]:
        """The blocks that get the finer grid: as many of the order as come nearest to the share."""
        weights: dict[int, int] = {}
        scores: dict[int, float] = {}
        for x in layers.values():
            if x.layer is not None and x.layer.block is not None:
                weights[x.layer.block] = weights.get(x.layer.block, 0) + x.weights
                scores[x.layer.block] = x.importance or 0.0
        order = sorted(weights)
        if self.score == "random":
            random.Random(self.seed).shuffle(order)
            if self.reverse:
                order.reverse()
        else:
            order.sort(key=lambda block: scores[block] if self.reverse else -scores[block])  # ties: lower index first
        wanted, taken = self.share * sum(weights.values()), 0
        first: set[int] = set()
        for block in order:
            if abs(taken + weights[block] - wanted) > abs(taken - wanted):
                break
            taken += weights[block]
            first.add(block)
        return first
