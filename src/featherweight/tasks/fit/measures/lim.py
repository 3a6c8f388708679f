"""LIM (layer-wise quantisation, arXiv 2406.17415): how much a block changes the hidden states.

LIM_i = -mean_t cos(h_in(t), h_out(t));   s_l = (1 + LIM of its block) * its share of all weights
"""

from __future__ import annotations

from featherweight.methods.budget.importance import lim_of
from featherweight.tasks.fit.measures.base import Asked, Measure, register, spread_over_layers


@register("sensitivity", "lim")
class Lim(Measure):
    """Change of direction of hidden states (see the module)."""

    title = "how much a block changes its input (LIM)"
    passes = "one"

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        assert asked.network is not None
        return spread_over_layers(asked, [1 + score for score in lim_of(asked.network.block_states())])
