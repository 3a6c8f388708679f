"""The kinds of mutation by name, and how a case is drawn from its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mutations.bases import Base
from mutations.files import Files, Unreadable

Mutation = Callable[[random.Random, Files], str]
"""Changes the files and says how; raises Unreadable where there is nothing to change."""

KINDS: dict[str, Mutation] = {}
PAIRS = 0.25
"""Share of the cases that have two mutations."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, 0.0, 1.0, -1.0, 0.5, 512.0, 1e-300, 1e300,
    float("nan"), float("inf"), "", "4", "512.0", "nonsense", "float16", "torch.bfloat16", [], [1], ["a"], [None],
    {}, {"a": 1}, {"rope_type": "default"}, "\u00e9\n\x1b[31m", "x" * 2000,
)  # fmt: skip


def kind(name: str) -> Callable[[Mutation], Mutation]:
    """Registers a mutation."""

    def register(function: Mutation) -> Mutation:
        assert name not in KINDS, name
        KINDS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Case:
    """What became of a base: (kind, words) of each mutation in their order."""

    number: int
    base: Base
    steps: tuple[tuple[str, str], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.steps)

    def describe(self) -> str:
        return f"{self.base.name}: " + "; ".join(f"{name}: {words}" for name, words in self.steps)


def all_kinds() -> dict[str, Mutation]:
    for module in ("bytes", "tensors", "settings", "texts"):
        import_module(f"mutations.{module}_kinds")
    return KINDS


def draw(number: int, bases: Sequence[tuple[Base, Files]]) -> tuple[Case, Files]:
    """The case of a number: the same for ever, as long as bases and kinds stay."""
    kinds = all_kinds()
    chance = random.Random(number)
    base, original = chance.choice(bases)
    files = original.copy()
    wanted = 2 if chance.random() < PAIRS else 1
    steps: list[tuple[str, str]] = []
    for _ in range(100):
        name = chance.choice(sorted(kinds))
        before = files.copy()
        try:
            words = kinds[name](chance, files)
        except Exception as error:  # on the ruins of the first one the second may find anything
            if not steps and not isinstance(error, Unreadable):
                raise
            files = before
            continue
        steps.append((name, words))
        if len(steps) == wanted:
            break
    return Case(number, base, tuple(steps)), files


def some(chance: random.Random, choices: Sequence[Any]) -> Any:
    """One of the choices; Unreadable where there are none."""
    if not choices:
        raise Unreadable("nothing to choose from")
    return chance.choice(list(choices))


def near(chance: random.Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)])
    if isinstance(value, float):
        return chance.choice([value * 2, value / 2, -value, int(value), str(value), value * 1e3])
    if isinstance(value, str):
        place = chance.randrange(len(value) + 1)
        return chance.choice(
            [value.upper(), value[:place] + value[place + 1 :], value + "x", [value], f"torch.{value}"]
        )
    if isinstance(value, list):
        return chance.choice([value[:-1], value + value[-1:], value[::-1], {"0": value}])
    if isinstance(value, dict):
        return chance.choice([list(value.items()), dict(list(value.items())[1:]), {"default": value}])
    return chance.choice([0, "", False])


def mutate_inside(chance: random.Random, value: Any, deepest: int = 8) -> tuple[Any, str]:
    """Change one place somewhere within a JSON value; the new value, and where it was changed."""
    if deepest and isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}, f".{key} removed"
        new, where = mutate_inside(chance, value[key], deepest - 1)
        return {**value, key: new}, f".{key}{where}"
    if deepest and isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:place] + value[place + 1 :], f"[{place}] removed"
        new, where = mutate_inside(chance, value[place], deepest - 1)
        return [*value[:place], new, *value[place + 1 :]], f"[{place}]{where}"
    new = chance.choice(ODD) if chance.random() < 0.5 else near(chance, value)
    return new, f" = {shown(new)}"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
