"""Tasks as lines of JSON: multiple choice, and words to be found at the end of a passage (cloze).

    {"question": "What is frozen water?", "choices": ["ice", "steam"], "answer": 0}
    {"context": "The river was frozen, and they walked over the", "choices": ["ice", "steam"], "answer": "ice"}
    {"context": "The river was frozen, and they walked over the", "target": "ice"}

A question is asked as "Question: ...", a line break and "Answer:"; a context is continued as it stands. One space is
put before a choice or a target, unless it begins, or the context ends, with white space. An answer is the place of the
right choice, counted from 0, or its text.

They are scored by what lm-evaluation-harness calls `acc` and `acc_norm`: the choice whose whole text is likeliest, and
the one that is likeliest a character; of a cloze by whether each token of the target is the likeliest at its place.
They are scored here even where that package is installed, so that one file has one result on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import EvaluationError, shown
from featherweight.model.text.files import read_text
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.system.places import ASSETS
from featherweight.tasks.evaluate.questions.likelihood import Engine, Likelihood, Progress, Request, fitted, pair

BUNDLED = ("novels-choice", "novels-cloze")
"""Tasks that come with the package."""
SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")
LINE = "a line is {context or question, choices, answer} or {context or question, target}"


@dataclass(frozen=True)
class Item:
    """What is read, what may follow, and the place of what should; None for a cloze, whose one choice has to be found.

    line : in the file, from 1
    """

    context: str
    choices: tuple[str, ...]
    answer: int | None
    line: int


@dataclass(frozen=True)
class Task:
    """Items of a file. `sha256` is of its text."""

    name: str
    items: tuple[Item, ...]
    sha256: str

    def first(self, items: int | None) -> Task:
        """At most so many of its items."""
        return self if items is None else Task(self.name, self.items[:items], self.sha256)


def bundled_task(name: str) -> Task:
    """One of `BUNDLED`."""
    path = ASSETS / f"{name}.jsonl.xz"
    if not path.is_file():
        raise EvaluationError(
            f"this installation lacks the bundled task {name}: give one of your own with --tasks FILE"
        )
    return read_task(path, name)


def read_task(path: Path, name: str | None = None) -> Task:
    """A file, plain or compressed (.xz, .gz); empty lines are passed over.

    EvaluationError where it cannot be read, a line is malformed (which, and how), or none is there.
    """
    text = read_text(path, EvaluationError, "task")
    items = [_item(line, f"{path}, line {n}", n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not items:
        raise EvaluationError(f"the task {path} is empty: {LINE}")
    return Task(name or path.name, tuple(items), hashlib.sha256(text.encode()).hexdigest())


def _item(line: str, place: str, number: int) -> Item:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as reason:
        raise EvaluationError(f"{place} is not JSON: {reason}") from None
    if not isinstance(data, dict):
        raise EvaluationError(f"{place} is {shown(data)}: {LINE}")
    context = _context(data, place)
    if ("choices" in data) == ("target" in data):
        which = "both choices and a target" if "target" in data else "neither choices nor a target"
        raise EvaluationError(f"{place} has {which}: {LINE}")
    if "target" in data:
        target = _text(data["target"], "target", place)
        return Item(context, (_joined(context, target),), None, number)
    choices = data["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise EvaluationError(f"{place}: choices are {shown(choices)}, expected a list of at least two texts")
    texts = [_text(choice, "a choice", place) for choice in choices]
    if len(set(texts)) < len(texts):
        raise EvaluationError(
            f"{place}: two choices are the same, {shown(next(t for t in texts if texts.count(t) > 1))}"
        )
    return Item(context, tuple(_joined(context, text) for text in texts), _answer(data, texts, place), number)


def _context(data: Mapping[str, Any], place: str) -> str:
    if ("context" in data) == ("question" in data):
        which = "both a context and a question" if "context" in data else "neither a context nor a question"
        raise EvaluationError(f"{place} has {which}: {LINE}")
    if "question" in data:
        return f"Question: {_text(data['question'], 'the question', place)}\nAnswer:"
    return _text(data["context"], "the context", place)


def _text(value: object, what: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{place}: {what} is {shown(value)}, expected a text")
    return value


def _joined(context: str, continuation: str) -> str:
    return continuation if context[-1].isspace() or continuation[0].isspace() else f" {continuation}"


def _answer(data: Mapping[str, Any], choices: Sequence[str], place: str) -> int:
    answer = data.get("answer")
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    given = f"the answer is {shown(answer)}" if "answer" in data else "there is no answer"
    raise EvaluationError(f"{place}: {given}, expected the place of a choice, 0 to {len(choices) - 1}, or its text")


@dataclass(frozen=True)
class Answers:
    """What a model made of a task.

    scores : by each scorer, whether each item was answered right
    sha256 : of the items
    cut : how many contexts were cut at their beginning
    values : what else was measured, by name
    """

    scores: Mapping[str, tuple[bool, ...]]
    sha256: str
    cut: int = 0
    values: Mapping[str, float] = field(default_factory=dict)


def answer(task: Task, engine: Engine, tokenizer: Tokenizer, progress: Progress | None = None) -> Answers:
    """Have a model answer all items. EvaluationError where a choice is longer than its context, or it fails."""
    before = tokenizer.around()[0]
    requests: list[Request] = []
    shortened = 0
    for item in task.items:
        whole = [pair(tokenizer, before, item.context, choice) for choice in item.choices]
        for choice, request in zip(item.choices, whole, strict=True):
            if len(request.continuation) > (engine.context or len(request.continuation)):
                kind = "target" if item.answer is None else "choice"
                raise EvaluationError(
                    f"{task.name}, line {item.line}: the {kind} {shown(choice.strip())} has "
                    f"{len(request.continuation)} tokens and the model a context of {engine.context}: shorten it"
                )
        fitting = [fitted(request, engine.context, len(before)) for request in whole]
        shortened += fitting != whole
        requests += fitting
    found = iter(engine.likelihoods(requests, progress))
    scores = _scores([(item, [next(found) for _ in item.choices]) for item in task.items])
    return Answers(scores, task.sha256, shortened)


def _scores(answered: Sequence[tuple[Item, list[Likelihood]]]) -> dict[str, tuple[bool, ...]]:
    """`acc_norm` where every item has choices: a target that is found is found however long it is."""
    scores = {"acc": tuple(_right(item, given, per_character=False) for item, given in answered)}
    if all(item.answer is not None for item, _ in answered):
        scores["acc_norm"] = tuple(_right(item, given, per_character=True) for item, given in answered)
    return scores


def _right(item: Item, given: Sequence[Likelihood], per_character: bool) -> bool:
    if item.answer is None:
        return given[0].greedy
    lengths = [len(choice.strip()) if per_character else 1 for choice in item.choices]
    values = [one.nats / length for one, length in zip(given, lengths, strict=True)]
    return values.index(max(values)) == item.answer
