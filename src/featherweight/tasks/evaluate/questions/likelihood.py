"""What is asked of a model: how likely it finds a continuation of a context, and what it writes after one.

Every task is scored through here, those of lm-evaluation-harness included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from featherweight.errors import EvaluationError
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


class Request(NamedTuple):
    """Tokens of a context, at least one, and of what is to follow it, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token predicts nothing."""
        return self.context + self.continuation[:-1]


class Likelihood(NamedTuple):
    """log-probability (nats) of a whole continuation, and whether each of its tokens is the likeliest at its place."""

    nats: float
    greedy: bool


class Engine(Protocol):
    """A model that can be asked. `context` is the most tokens it reads at once, None if that is not known."""

    name: str
    context: int | None

    def likelihoods(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Likelihood]:
        """Of each request, in their order. `progress(done, total)` counts requests.

        EvaluationError where the model fails, or its output is not usable.
        """

    def write(self, tokens: Sequence[int], most: int, until: Sequence[str], sampling: Sampling) -> str:
        """At most `most` new tokens as text, without the first of the texts `until` and what is behind it."""


def pair(tokenizer: Tokenizer, before: Sequence[int], context: str, continuation: str) -> Request:
    """A context, not empty, and its continuation as tokens, behind those that the tokenizer puts before every text.

    Tokenized together, as the model has learned text; the continuation begins where the two differ from the context
    alone. White space at the end of the context counts to the continuation, whose first word brings it along.
    """
    alone = tokenizer.encode(context.rstrip(), special=False)
    whole = tokenizer.encode(context + continuation, special=False)
    if len(whole) < 2 and not before:  # both in one token
        whole = alone + tokenizer.encode(continuation, special=False)
    least, most = 0 if before else 1, len(whole) - 1
    shared = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    shared = max(least, min(shared, most))
    return Request((*before, *whole[:shared]), tuple(whole[shared:]))


def fitted(request: Request, context: int | None, prefix: int = 0) -> Request:
    """Without what the model has no room for: tokens behind the first `prefix` of the context, then these as well.

    ValueError where the continuation alone is longer than the model's context.
    """
    surplus = 0 if context is None else len(request.inputs) - context
    if surplus <= 0:
        return request
    if surplus >= len(request.context):
        raise ValueError("the continuation alone is longer than the model's context")
    kept = min(prefix, len(request.context) - surplus)
    return request._replace(context=request.context[:kept] + request.context[kept + surplus :])


def likelihood_of(logits: torch.Tensor, continuation: Sequence[int]) -> Likelihood:
    """Of logits float [n, vocabulary] at the places where the n tokens of the continuation are predicted.

    EvaluationError where they are no numbers, or a token has no place in the vocabulary.
    """
    chosen = torch.tensor(continuation, device=logits.device)
    if int(chosen.max()) >= logits.shape[-1]:
        raise EvaluationError(
            f"a task has token {int(chosen.max())} and the model a vocabulary of {logits.shape[-1]}: "
            "the tokenizer does not belong to this model"
        )
    logarithms = torch.log_softmax(logits.float(), dim=-1)
    nats = float(logarithms.gather(1, chosen[:, None]).cpu().sum(dtype=torch.float64))
    if math.isnan(nats):
        raise EvaluationError(
            "the model's logits are NaN or infinite on a task: use a wider --dtype, or check the weights with "
            "`feather verify`"
        )
    return Likelihood(nats, bool((logarithms.argmax(-1) == chosen).all()))


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of several others."""
    return text[: min((place for one in until if one and (place := text.find(one)) >= 0), default=len(text))]
