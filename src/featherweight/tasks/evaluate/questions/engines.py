"""The models that answer: transformers, and the native decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from featherweight.errors import EvaluationError
from featherweight.integrations.sampling import sampling_arguments
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.text.tokenizer import Tokenizer, quiet
from featherweight.system.transformers_calls import asking_transformers
from featherweight.tasks.evaluate.model_checks import own_context
from featherweight.tasks.evaluate.opening import ModelLike
from featherweight.tasks.evaluate.perplexity import BATCH_TOKENS, LogitsReader, smaller_batch
from featherweight.tasks.evaluate.questions.likelihood import Engine, Likelihood, Progress, Request, cut, likelihood_of

if TYPE_CHECKING:
    from featherweight.model.decoder.model import NativeModel


def open_engine(source: ModelLike, loaded: tuple[Any, Any], engine: str, threads: int | None) -> Engine:
    """What answers for a model: as it was loaded by transformers with its tokenizer, or its folder natively.

    EvaluationError for a model in memory that is to run natively; UnsupportedModelError where the decoder does not know
    the architecture.
    """
    model, tokenizer = loaded
    if engine == "transformers":
        return TransformersEngine(model, tokenizer, own_context(model))
    if isinstance(source, tuple):
        raise EvaluationError(
            "the native decoder runs folders, and this model is in memory: take engine='transformers'"
        )
    from featherweight.model.decoder.model import NativeModel

    return NativeEngine(NativeModel.open(source, threads=threads), tokenizer)


class TransformersEngine:
    """A model of transformers, called as in `perplexity.measure`: batches, padded at their ends."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: Any, context: int | None) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self._reader = LogitsReader(model)

    def likelihoods(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Likelihood]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].inputs))  # the longest is tried first
        found: dict[int, Likelihood] = {}
        most = None
        with torch.inference_mode():
            while len(found) < len(order):
                width = len(requests[order[len(found)]].inputs)
                count = min(most or len(order), max(1, BATCH_TOKENS // width))
                places = order[len(found) : len(found) + count]
                answers = self._batch([requests[i] for i in places], width)
                if answers is None:
                    most = smaller_batch(len(places), self._reader.device, "text", "")
                    continue
                found |= dict(zip(places, answers, strict=True))
                if progress is not None:
                    progress(len(found), len(order))
        return [found[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request], width: int) -> list[Likelihood] | None:
        """None where a device's memory does not suffice. What follows a causal model's last token changes nothing."""
        ids = torch.tensor([[*one.inputs, *[0] * (width - len(one.inputs))] for one in requests])
        with asking_transformers("run the model on a task", error=EvaluationError):
            try:
                positions = self._reader(ids)
            except torch.OutOfMemoryError:
                return None
        return [
            likelihood_of(positions.logits(row, len(one.context) - 1, len(one.inputs)), one.continuation)
            for row, one in enumerate(requests)
        ]

    def write(self, tokens: Sequence[int], most: int, until: Sequence[str], sampling: Sampling) -> str:
        prompt = torch.tensor([list(tokens)], device=self._reader.device)
        chosen: dict[str, Any] = sampling_arguments(sampling)
        if until:
            chosen |= {"stop_strings": list(until), "tokenizer": self.tokenizer}
        with asking_transformers("generate with this model", error=EvaluationError), quiet(), torch.inference_mode():
            made = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, **chosen)
        return cut(Tokenizer.of(self.tokenizer).decode(made[0, len(tokens) :].tolist()), until)


class NativeEngine:
    """The native decoder. What a request shares with the one before it, as choices do, is not computed again."""

    name = "native"

    def __init__(self, model: NativeModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, Tokenizer.of(tokenizer)
        self.context: int | None = model.context
        self._held: list[int] = []

    def likelihoods(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Likelihood]:
        found = []
        for number, request in enumerate(requests, 1):
            found.append(likelihood_of(self._logits(request), request.continuation))
            if progress is not None:
                progress(number, len(requests))
        return found

    def _logits(self, request: Request) -> torch.Tensor:
        """float32 [tokens of the continuation, vocabulary]."""
        inputs, last = list(request.inputs), len(request.context) - 1
        same = next((i for i, (a, b) in enumerate(zip(self._held, inputs, strict=False)) if a != b), len(self._held))
        kept = min(same, last)
        self.model.keep(kept)
        self._held = []  # until it is known to be there: a call may be interrupted
        if last > kept:
            self.model.feed(inputs[kept:last])
        logits = self.model.feed_all(inputs[last:])
        self._held = inputs
        return logits

    def write(self, tokens: Sequence[int], most: int, until: Sequence[str], sampling: Sampling) -> str:
        made: list[int] = []

        def stop(token: int) -> bool:
            made.append(token)
            text = self.tokenizer.decode(made)
            return any(one in text for one in until)

        self._held = []
        return cut(self.tokenizer.decode(self.model.generate(tokens, most, sampling, stop)), until)
