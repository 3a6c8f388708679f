"""Mixed precision under a budget: the grids that miss least in all for a given mean number of stored bits a weight.

    minimise  sum_l n_l e_l(c_l)   subject to   sum_l b_l(c_l) <= bits / 8 * sum_l n_l

with n_l the weights of layer l, e_l(c) its relative squared error with candidate c, b_l(c) the bytes stored: a
multiple-choice knapsack. It is solved as Sinha and Zoltners (Operations Research 27, 1979) begin: each layer's
candidates are reduced to the lower convex hull of error over bytes, all layers start with the fewest bytes, and steps
along the hulls are taken in the order of error saved per byte. A step that no longer fits is left out with those behind
it in its layer; other layers go on. Where no step is left out before the last that is taken, the result is optimal for
the bytes it takes; otherwise it misses the optimum by less than what the first step left out would save. Everything
stored is counted, scales and terms of corrections too.

No preset uses it: on the bundled model, whose layers are much alike, a mean of three bits stays three bits in all or
nearly all layers, and perplexity is no better. It serves budgets between two grids, and models with layers that are not
alike.

Related: HAWQ-V3 (arXiv 2011.10680) solves the same problem with an integer program and Hessian traces for errors.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from featherweight.errors import RecipeError
from featherweight.methods.budget.base import Allocator, Candidate, LayerCandidates
from featherweight.methods.quantize.choosing import with_settings
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register


@register("allocation", "mixed-precision")
class MixedPrecision(Allocator):
    """Of several grids, to each layer the one that serves a mean number of bits best (see the module)."""

    needs_errors: ClassVar[bool] = True

    bits: float = Field(3.25, gt=0, description="most stored bits a weight, on average over all compressed layers")
    grids: tuple[dict[str, Any], ...] = Field(
        ({"bits": 2}, {"bits": 3}, {"bits": 4}),
        description="what each candidate changes in the recipe's grid; with a kind, another grid",
    )
    errors: Literal["weights", "outputs"] = Field(
        "weights",
        description="what is measured: the weights, data-free, or layers' outputs, by the second moments in a "
        "statistics file",
    )

    @field_validator("grids")
    @classmethod
    def _some(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        if not value:
            raise ValueError("name at least one grid")
        return value

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.errors == "outputs" else ()

    def treatments(self, treatment: Treatment) -> tuple[Treatment, ...]:
        """The treatment with each of the grids. RecipeError naming the setting that is wrong."""
        return tuple(
            replace(treatment, grid=with_settings("grid", treatment.grid, settings, f"allocation.grids[{place}]"))
            for place, settings in enumerate(self.grids)
        )

    def most_bytes(self, layers: Mapping[str, LayerCandidates]) -> int:
        return min(super().most_bytes(layers), self.budget(layers))

    def budget(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Bytes for all layers. RecipeError where the smallest candidates take more."""
        weights = sum(layer.weights for layer in layers.values())
        budget = math.floor(self.bits * weights / 8)
        least = sum(min(candidate.nbytes for candidate in layer.candidates) for layer in layers.values())
        if least > budget:
            raise RecipeError(
                f"allocation.bits is {self.bits:g}, but with the smallest grid everywhere these layers already take "
                f"{8 * least / max(1, weights):.4f} bits a weight, scales and all: allow as many, or name a smaller "
                "grid in allocation.grids"
            )
        return budget

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        hulls = {name: lower_hull(layer.candidates) for name, layer in layers.items()}
        room = self.budget(layers) - sum(hull[0].nbytes for hull in hulls.values())
        reached = dict.fromkeys(hulls, 0)
        steps: list[tuple[float, int, str]] = []
        order = {name: place for place, name in enumerate(hulls)}

        def offer(name: str) -> None:
            """Put the next step of a layer among those that may be taken."""
            hull, place = hulls[name], reached[name]
            if place + 1 < len(hull):
                here, there = hull[place], hull[place + 1]
                saved = layers[name].weights * (error_of(here) - error_of(there))
                heapq.heappush(steps, (-saved / (there.nbytes - here.nbytes), order[name], name))

        for name in hulls:
            offer(name)
        while steps:
            _, _, name = heapq.heappop(steps)
            hull, place = hulls[name], reached[name]
            more = hull[place + 1].nbytes - hull[place].nbytes
            if more <= room:
                room -= more
                reached[name] = place + 1
                offer(name)
        return {name: hull[reached[name]].treatment for name, hull in hulls.items()}


def lower_hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates on the lower convex hull of error over bytes: bytes rise, errors fall, never faster than before.

    The first takes the fewest bytes of all and, among those, misses least.
    """
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.nbytes, error_of(c))):
        if hull and error_of(candidate) >= error_of(hull[-1]):
            continue
        while len(hull) > 1 and _slope(hull[-2], candidate) < _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(candidate)
    return hull


def _slope(one: Candidate, other: Candidate) -> float:
    """Error a byte, from the smaller candidate to the larger; negative where the larger misses less."""
    return (error_of(other) - error_of(one)) / (other.nbytes - one.nbytes)


def error_of(candidate: Candidate) -> float:
    """The measured error. ValueError where there is none."""
    if candidate.error is None:
        raise ValueError("mixed-precision chooses by measured errors, and this candidate has none")
    return candidate.error
