"""Layers count by their weights: s_l = its share of all weights, so that relative errors of outputs are added up."""

from __future__ import annotations

from featherweight.tasks.fit.measures.base import Asked, Measure, register


@register("sensitivity", "weights")
class Weights(Measure):
    """Share of all weights (see the module)."""

    title = "share of all weights: errors of outputs are added up"
    passes = "none"
    needs_network = False
    needs_text = False

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        total = sum(layer.parameters for layer in asked.layers)
        return {layer.name: layer.parameters / total for layer in asked.layers}
