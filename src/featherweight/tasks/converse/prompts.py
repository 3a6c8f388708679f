"""What conversations begin with: prompts that come with the package, in an order that the seed decides."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import yaml

from featherweight.errors import CalibrationError
from featherweight.system.files import sha256_of
from featherweight.system.places import ASSETS

PROMPTS = ASSETS / "prompts.yaml"
SYSTEM_SHARE = 0.25
"""Of conversations that begin with a system message, where the template takes one."""


@dataclass(frozen=True)
class Opening:
    """A conversation before anybody has answered.

    questions : what the user says, in order; system : the message before that, or ""
    tools : JSON schemas of the tools that the model may call
    """

    questions: tuple[str, ...]
    system: str = ""
    tools: tuple[Any, ...] = ()


@functools.cache
def _shipped() -> dict[str, Any]:
    return dict(yaml.safe_load(_text()))


def _text() -> str:
    try:
        return PROMPTS.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"this installation lacks {PROMPTS} ({error.strerror}): install it again") from None


def prompts_digest() -> str:
    """SHA-256 (hex) of the shipped prompts."""
    return sha256_of(_text())


def opening(number: int, seed: int, turns: int) -> Opening:
    """Number `number` (from 0) of the conversations of a seed: every prompt once, then every prompt once more, ...

    It depends on nothing but the arguments and the shipped prompts.
    """
    shipped = _shipped()
    firsts: list[tuple[str, tuple[str, ...]]] = [
        (prompt, ()) for prompts in shipped["prompts"].values() for prompt in prompts
    ]
    firsts += [(call["prompt"], tuple(call["tools"])) for call in shipped["calls"]]
    order = list(range(len(firsts)))
    random.Random(f"order {seed} {number // len(firsts)}").shuffle(order)
    first, tools = firsts[order[number % len(firsts)]]
    chance = random.Random(f"conversation {seed} {number}")
    system = chance.choice(shipped["systems"]) if chance.random() < SYSTEM_SHARE else ""
    later = chance.sample(shipped["follow_ups"], turns - 1)
    return Opening((first, *later), system, tuple(shipped["tools"][name] for name in tools))
