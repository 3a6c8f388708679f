"""Tasks of lm-evaluation-harness, asked of the engines of this package. Imported only where that package is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from featherweight.errors import EvaluationError, FeatherError, FeatherWarning
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.system.transformers_calls import one_line
from featherweight.tasks.evaluate.questions.items import Answers
from featherweight.tasks.evaluate.questions.likelihood import Engine, Progress, Request, fitted

NEW_TOKENS = 256
"""Of an answer, where a task does not say how long it may be; as in the harness's own models."""
UNKNOWN_CONTEXT = 2048
"""Tokens, where a model's configuration does not say; as in the harness's own models."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks, put to an engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
        super().__init__()
        self.engine, self.reader, self.progress = engine, tokenizer, progress
        self.before = tokenizer.around()[0]
        self.cut = 0
        """Contexts that were shortened at their beginning."""

    @property
    def max_length(self) -> int:
        return self.engine.context or UNKNOWN_CONTEXT

    @property
    def eot_token_id(self) -> int:
        return self.reader.eos or 0

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with, before its first token is predicted."""
        return self.before[0] if self.before else self.reader.bos or self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """What the tokenizer puts before a text stands there unless it is not wanted, or has been written out."""
        tokens = self.reader.encode(string, special=False)
        bare = add_special_tokens is False or tokens[: len(self.before)] == self.before
        return tokens if bare else [*self.before, *tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        fitting = []
        for (_, text), context, continuation in requests:
            request = Request(tuple(context), tuple(continuation))
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's context of "
                    f"{self.max_length}: {text[:40]!r} ..."
                )
            fitting.append(fitted(request, self.max_length, len(self.before)))
            self.cut += fitting[-1] != request
        return [(one.nats, one.greedy) for one in self.engine.likelihoods(fitting, self.progress)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            tokens = self.reader.encode(request.args[0], special=False)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows = [Request(*map(tuple, make_disjoint_window(one))) for one in pairs]
            found.append(sum(one.nats for one in self.engine.likelihoods(windows)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for number, request in enumerate(requests, 1):
            text, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or NEW_TOKENS)
            most = min(most, self.max_length - 1)
            prompt = Request(tuple(self.tok_encode(text)) or (self.prefix_token_id,), (0,) * (most + 1))
            short = fitted(prompt, self.max_length, len(self.before))
            self.cut += short != prompt
            found.append(self.engine.write(short.context, most, until, sampling_of(settings)))
            if self.progress is not None:
                self.progress(number, len(requests))
        return found


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """What a task asks of a generation: the likeliest tokens, unless it wants some drawn at a temperature."""
    temperature = float(settings.get("temperature") or 0.0)
    drawn = bool(settings.get("do_sample", temperature > 0))
    return Sampling(
        temperature=temperature if drawn else 0.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        seed=0,
    )


@functools.cache
def task_manager(shipped: bool = True) -> Any:
    """What knows the harness's tasks by name. It reads the descriptions of all of them, which takes seconds.

    shipped : False for what needs none of these, as a task that a file describes
    """
    with _quietly():
        return TaskManager(include_defaults=shipped)


def harness_answer(
    manager: Any, name: str | Path, engine: Engine, tokenizer: Tokenizer, items: int | None, progress: Progress | None
) -> Answers:
    """Have a model answer a task, a group of tasks, or one described in a YAML file of the harness's.

    items : the first so many of each task

    Returns
    -------
    Its answers by every scorer that says right or wrong of each item, items of a group's tasks one after the other;
    as values, the means of what is measured otherwise, such as the perplexity of lambada's words.

    Raises
    ------
    EvaluationError
        The task's data cannot be had, or it wants what is no text.
    """
    model = HarnessModel(engine, tokenizer, _spoken(progress))
    try:
        with _quietly(), _same_random_numbers():
            found = simple_evaluate(
                model, tasks=[str(name)], limit=items, bootstrap_iters=0, task_manager=manager, log_samples=True
            )
    except FeatherError:
        raise
    except Exception as reason:  # of data sets that cannot be had there are as many kinds as places they come from
        raise EvaluationError(
            f"lm-evaluation-harness cannot run the task {name} ({type(reason).__name__}: {one_line(reason)}): its data "
            "set may need a connection to the hub, or a package of its own"
        ) from None
    samples = [found["samples"][task] for task in sorted(found["samples"])]
    scores = scores_of(samples)
    seen = hashlib.sha256("".join(str(one["doc_hash"]) for task in samples for one in task).encode()).hexdigest()
    return Answers(scores, seen, model.cut, _values(found["results"], scores))


def _spoken(progress: Progress | None) -> Progress | None:
    """Progress that is seen although the harness's own is not."""
    if progress is None:
        return None
    here = sys.stderr

    def tell(done: int, total: int) -> None:
        with contextlib.redirect_stderr(here):
            progress(done, total)

    return tell


def scores_of(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, tuple[bool, ...]]:
    """By each metric that is 0 or 1 for every item of every task, whether items are right, in the order of their ids.

    A task with several filters of its answers has a score for each, named METRIC,FILTER.
    """
    named: list[dict[str, dict[int, Any]]] = []
    for samples in tasks:
        found: dict[str, dict[int, Any]] = {}
        several = len({one.get("filter") for one in samples}) > 1
        for one in samples:
            for metric in one["metrics"]:
                name = f"{metric},{one['filter']}" if several else str(metric)
                found.setdefault(name, {})[int(one["doc_id"])] = one[metric]
        named.append(found)
    common = [name for name in (named[0] if named else {}) if all(name in found for found in named)]
    scores = {}
    for name in common:
        values = [value for found in named for _, value in sorted(found[name].items())]
        if all(isinstance(value, int | float | np.number | np.bool_) and value in (0, 1) for value in values):
            scores[name] = tuple(bool(value) for value in values)
    return dict(sorted(scores.items(), key=lambda one: one[0].partition(",")[0] != "acc"))


def _values(results: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that are no scores, by name; those of a group's tasks behind the task's name."""
    found = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            known = metric in scores or f"{metric},{chosen}" in scores or metric.endswith("_stderr")
            if chosen and not known and isinstance(value, int | float):
                found[metric if len(results) == 1 else f"{task} {metric}"] = float(value)
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's log and bars, which are about its own command line; our own warnings come afterwards."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as said, contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("always")
            yield
    finally:
        log.setLevel(before)
        for one in said:
            if issubclass(one.category, FeatherWarning):
                warnings.warn(one.message, stacklevel=3)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The harness sets seeds, so that every model gets the same items; afterwards all generators are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
