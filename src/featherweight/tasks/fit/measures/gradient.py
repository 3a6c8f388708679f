"""Gradient times change, as in the AutoScheme of auto-round: the change of the loss to first order.

    s_l = |sum_ij g_ij dW_ij| / e_l,   g the gradient of the mean negative log-likelihood, dW = Q - W

A trained model stands near a minimum on its own text, where g is small and of either sign: what is left is first order
in dW, while the error e_l is second order, so that s_l hangs on the way that it is taken with.
"""

from __future__ import annotations

from featherweight.tasks.fit.measures.base import Asked, Measure, gradients, per_error, register


@register("sensitivity", "gradient")
class Gradient(Measure):
    """|g . dW| (see the module)."""

    title = "gradient times change"
    passes = "one forwards and backwards"

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        gradient = gradients(asked)
        found = {}
        for layer in asked.layers:
            loss = abs(float((gradient[layer.name] * asked.change(layer)).sum()))
            found[layer.name] = {"loss": loss, "error": asked.error(layer)}
        return per_error(found, "loss")
