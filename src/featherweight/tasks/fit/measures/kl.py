"""The divergence when one layer alone is changed, per error.

    s_l = KL(original || layer l alone replaced) / e_l

e_l the relative squared error of the layer's output with the code that replaces it. To second order the divergence is
quadratic in the change, so s_l is the same for all ways, and that of a whole model about the sum of s_l e_l: the linear
model of the divergence by which bytes are given out. How far sums are from the truth is measured on true models.
"""

from __future__ import annotations

from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.tasks.fit.measures.base import Asked, Measure, per_error, register


@register("sensitivity", "kl")
class Divergence(Measure):
    """True divergence of one layer's change (see the module)."""

    title = "true divergence with one layer changed"
    passes = "one a layer, from its block on: half a pass each"

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        network = asked.network
        assert network is not None

        def find(layer: LinearLayer) -> dict[str, float]:
            code = asked.curves.code(asked.typical(layer))
            compared = network.compare({layer.name: code.decode()}, network.first_block([layer]))
            return {"divergence": compared.mean, "deviation": compared.deviation, "error": asked.error(layer)}

        return per_error(asked.by_layer("kl", find), "divergence")
