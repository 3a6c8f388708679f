"""When the numbers of an evaluation are none to rely on, in sentences."""

from __future__ import annotations

from featherweight.tasks.evaluate.perplexity import Measurement

UNCERTAIN = 0.05
"""Of perplexity: beyond this relative standard error, presets that differ by ten per cent cannot be told apart."""
USELESS_KL = 1.0
"""Nats a token. On the bundled model, presets above it more than double the perplexity (docs/results.md)."""


def warnings_of(measured: Measurement) -> list[str]:
    """Sentences about what these numbers cannot be trusted for; none where all is well."""
    loss, said = measured.loss, []
    error, windows = loss.standard_error, len(loss.counts)
    more = "score more tokens (a longer --text, a larger --limit)"
    if error is None:
        said.append(
            f"a single window of {loss.tokens} tokens was scored, from which no standard error can be told: {more}, or "
            "take a smaller --context"
        )
    elif error > UNCERTAIN:
        said.append(
            f"{loss.tokens} tokens in {windows} windows leave the perplexity uncertain by {100 * error:.0f} % (one "
            f"standard error): {more}"
        )
    kl = measured.divergence
    if kl is not None and kl.mean > USELESS_KL:
        said.append(
            f"the KL divergence of {kl.mean:.2f} nats a token says that this model is of no use: it agrees with the "
            f"original about the next token in {100 * kl.top1_agreement:.0f} % of all places; compress it less"
        )
    return said
