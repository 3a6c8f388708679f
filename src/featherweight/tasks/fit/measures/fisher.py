"""The diagonal of the Fisher information times the squared change: the divergence to second order, crosswise terms left
out.

    s_l = T / 2 sum_ij F_ij dW_ij^2 / e_l,   F = mean over windows of squared gradients

(the empirical diagonal, as SqueezeLLM, arXiv 2306.07629, has it). The gradient of a window is the mean over its T
tokens, so that F of single tokens is T times as much where tokens' gradients have no common direction.
"""

from __future__ import annotations

from featherweight.tasks.fit.measures.base import Asked, Measure, gradients, per_error, register


@register("sensitivity", "fisher")
class Fisher(Measure):
    """F . dW^2 (see the module)."""

    title = "diagonal of the Fisher information times squared change"
    passes = "one forwards and backwards"

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        assert asked.network is not None
        squares, length = gradients(asked, squared=True), asked.network.windows.shape[1]
        found = {}
        for layer in asked.layers:
            value = length / 2 * float((squares[layer.name] * asked.change(layer).square()).sum())
            found[layer.name] = {"divergence": value, "error": asked.error(layer)}
        return per_error(found, "divergence")
