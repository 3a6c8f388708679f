"""ZD (layer-wise quantisation, arXiv 2406.17415): the share of a block's weights that stand out; data-free.

    ZD_i = share of z > 1, z = (w - mean) / deviation of all weights of the block;   s_l = its share of weights / ZD

Fewer that stand out: more important. The paper only ranks by it; the quotient is one of many that keep the order.
"""

from __future__ import annotations

from featherweight.methods.budget.importance import zd_of
from featherweight.tasks.fit.measures.base import Asked, Measure, register, spread_over_layers


@register("sensitivity", "zd")
class Zd(Measure):
    """Distribution of a block's weights (see the module)."""

    title = "how few of a block's weights stand out (ZD)"
    passes = "none"
    needs_network = False
    needs_text = False

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        scores = []
        for block in range(1 + max((x.block for x in asked.layers if x.block is not None), default=-1)):
            inside = [layer for layer in asked.layers if layer.block == block]
            scores.append(1 / max(1e-6, zd_of([(lambda x=x: asked.weight(x)) for x in inside])) if inside else 0.0)  # type: ignore[misc]
        return spread_over_layers(asked, scores)
