"""Which tasks are meant, and what models make of them: accuracies with intervals, beside the original's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import EvaluationError
from featherweight.model.text.files import read_text
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.registry import nearest
from featherweight.tasks.evaluate.questions.items import (
    BUNDLED,
    SUFFIXES,
    Answers,
    Task,
    answer,
    bundled_task,
    read_task,
)
from featherweight.tasks.evaluate.questions.likelihood import Engine, Progress
from featherweight.tasks.evaluate.questions.paired import INSTALL, Interval, Paired, paired, wilson

ENGINES = ("transformers", "native")
HARNESS = "lm-evaluation-harness"
HARNESS_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class HarnessTask:
    """One of lm-evaluation-harness's. `manager` finds it, `place` is its name or its file."""

    name: str
    place: str | Path
    manager: Any
    items: int | None


@dataclass(frozen=True)
class Chosen:
    """Tasks to ask, and the engine that answers."""

    tasks: tuple[Task | HarnessTask, ...]
    engine: str

    def ask(self, engine: Engine, tokenizer: Any, progress: Progress | None = None) -> dict[str, Answers]:
        """A model's answers by the names of the tasks. EvaluationError where it fails, or a task cannot be had."""
        reader, found = Tokenizer.of(tokenizer), {}
        for task in self.tasks:
            if isinstance(task, Task):
                found[task.name] = answer(task, engine, reader, progress)
            else:
                from featherweight.tasks.evaluate.questions.harness import harness_answer

                found[task.name] = harness_answer(task.manager, task.place, engine, reader, task.items, progress)
        return found


def choose(names: str | Path | Sequence[str | Path], items: int | None = None, engine: str = "transformers") -> Chosen:
    """Tasks by name: those that come with the package, files (.jsonl, or .yaml as lm-evaluation-harness has them), and
    tasks of lm-evaluation-harness. A file goes before a task of its name.

    items : the first so many of each

    EvaluationError where there is none of that name (with the nearest), the harness is missing that knows it, a file is
    malformed, one is named twice, or there is no such engine.
    """
    if engine not in ENGINES:
        raise EvaluationError(f"the engine is {engine!r}, expected {' or '.join(ENGINES)}")
    if items is not None and items < 1:
        raise EvaluationError(f"{items} items were asked for, and a task needs at least one")
    given = [names] if isinstance(names, str | Path) else list(names)
    if not given:
        raise EvaluationError(f"no task is named: give one of {', '.join(BUNDLED)}, a file, or a task of {HARNESS}")
    tasks = [_find(str(name), items) for name in given]
    known = [task.name for task in tasks]
    twice = next((name for i, name in enumerate(known) if name in known[:i]), None)
    if twice is not None:
        raise EvaluationError(f"two tasks are called {twice}: name each once, and give files names of their own")
    return Chosen(tuple(tasks), engine)


def _find(name: str, items: int | None) -> Task | HarnessTask:
    """One task, of which the first so many items are asked."""
    path = Path(name).expanduser()
    if name.endswith(HARNESS_FILES):
        if not path.is_file():
            raise EvaluationError(f"there is no task file {name}")
        alone = "group" not in read_text(path, EvaluationError, "task")  # a group may name tasks of the harness's
        return HarnessTask(path.name, path.absolute(), _manager(name, shipped=not alone), items)
    if name.endswith(SUFFIXES) or path.is_file():
        return read_task(path).first(items)
    if name in BUNDLED:
        return bundled_task(name).first(items)
    manager = _manager(name)
    known = [*BUNDLED, *manager.all_tasks]
    if name not in known:
        raise EvaluationError(
            f"there is no task called {name!r}{nearest(name, known)}: the package brings {', '.join(BUNDLED)}, "
            f"others are those of {HARNESS} and files (.jsonl, .yaml)"
        )
    return HarnessTask(name, name, manager, items)


def _manager(name: str, shipped: bool = True) -> Any:
    """What finds the harness's tasks; EvaluationError where that package is missing, which is needed for `name`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            f"there is no task called {name!r}{nearest(name, BUNDLED)} here: the package brings "
            f"{', '.join(BUNDLED)}, files end in .jsonl, and tasks of {HARNESS} need that package: {INSTALL}"
        )
    from featherweight.tasks.evaluate.questions.harness import task_manager

    return task_manager(shipped)


@dataclass(frozen=True)
class Score:
    """Answers to a task by one scorer: `right` for each item, and beside the original's, if there is one."""

    name: str
    right: tuple[bool, ...]
    against: Paired | None = None

    @property
    def accuracy(self) -> float:
        """The share of items that are answered right."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> Interval:
        """Wilson's, 95 %, of the accuracy: the items are taken as drawn from all that might have been."""
        return wilson(sum(self.right), len(self.right))

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "accuracy": self.accuracy,
            "interval_low": self.interval.low,
            "interval_high": self.interval.high,
            "right": [int(one) for one in self.right],
        }
        if self.against is not None:
            other = self.against
            found |= {
                "accuracy_against": other.accuracy,
                "interval_low_against": other.interval.low,
                "interval_high_against": other.interval.high,
                "lost": other.lost,
                "won": other.won,
                "flipped": (other.lost + other.won) / len(self.right),
                "p": other.p,
                "test": other.test,
                "kappa": other.kappa,
            }
        return found


@dataclass(frozen=True)
class TaskResult:
    """What a model made of a task. `scores`, the first of which tables show; `values` of what has no right or wrong.

    sha256 : of the items
    engine : what ran the model, "transformers" or "native"
    """

    name: str
    items: int
    sha256: str
    engine: str
    scores: tuple[Score, ...]
    values: Mapping[str, float] = field(default_factory=dict)
    values_against: Mapping[str, float] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """Results that agree in it are of the same items, asked in the same way."""
        return f"{self.name}, {self.items} items, {self.engine}, sha256 {self.sha256[:16]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "items": self.items,
            "sha256": self.sha256,
            "engine": self.engine,
            "setting": self.setting,
            "scores": {score.name: score.to_json() for score in self.scores},
            "values": dict(self.values),
            "values_against": dict(self.values_against),
        }

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) in words."""
        found = []
        for score in self.scores:
            name = f"{self.name}, {score.name}"
            found.append((name, f"{share_text(score.accuracy, score.interval)} of {self.items} items"))
            if score.against is not None:
                found.append((f"{name}, the original", share_text(score.against.accuracy, score.against.interval)))
                found.append((f"{name}, answers that changed", change_text(score.against)))
        for value, number in self.values.items():
            other = self.values_against.get(value)
            beside = "" if other is None else f" (the original's {other:.4g})"
            found.append((f"{self.name}, {value}", f"{number:.4g}{beside}"))
        return found


def results_of(
    chosen: Chosen, answers: Mapping[str, Answers], original: Mapping[str, Answers] | None
) -> tuple[TaskResult, ...]:
    """Answers as results, in the order of the tasks. EvaluationError where the original was asked other items."""
    found = []
    for task in chosen.tasks:
        own, other = answers[task.name], None if original is None else original[task.name]
        if other is not None and other.sha256 != own.sha256:
            raise EvaluationError(f"the task {task.name} gave the original other items: it cannot be compared on them")
        scores = tuple(
            Score(name, right, None if other is None or name not in other.scores else paired(right, other.scores[name]))
            for name, right in own.scores.items()
        )
        items = len(scores[0].right) if scores else 0
        values = {} if other is None else other.values
        found.append(TaskResult(task.name, items, own.sha256, chosen.engine, scores, own.values, values))
    return tuple(found)


def share_text(share: float, interval: Sequence[float]) -> str:
    """An accuracy in per cent, with its interval."""
    return f"{100 * share:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def change_text(found: Paired) -> str:
    """What became of the original's answers."""
    text = f"{found.lost} lost, {found.won} won"
    if found.p is None:
        return f"{text}; p needs statsmodels ({INSTALL})"
    kappa = "not defined" if found.kappa is None else f"{found.kappa:.3f}"
    return f"{text}; McNemar p {p_text(found.p)} ({found.test}), kappa {kappa}"


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
