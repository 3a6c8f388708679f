"""Fixed allocation: every layer gets the treatment the recipe names for it."""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.methods.budget.base import Allocator, LayerCandidates
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register


@register("allocation", "fixed")
class Fixed(Allocator):
    """No budget: what the recipe and its overrides say."""

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        return {name: layer.candidates[0].treatment for name, layer in layers.items()}
