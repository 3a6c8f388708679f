"""The one way in which work says how it goes: an observer receives events, JSON-able mappings of facts.

Runs write every event to a log (`featherweight.storage.run.log`), the command draws progress from them, methods report
steps, losses and reasons with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

Observer = Callable[[dict[str, Any]], None]
"""Receives events. A run's have the key "event"; what a method reports are facts such as step, loss, or a reason."""


def silent(event: dict[str, Any]) -> None:
    """An `Observer` that drops everything."""


Steps = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]
"""Given what is done, a context in which the number of steps that are done, and that of all, are told."""


def _unwatched(what: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    return contextlib.nullcontext(lambda done, total: None)


_steps: ContextVar[Steps] = ContextVar("steps", default=_unwatched)


def steps(what: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """For work that begins where no observer is passed, as when a model is opened by its name: whoever watches is told
    by the function that this context gives. The command shows it; elsewhere it drops everything."""
    return _steps.get()(what)


def watch_steps(watcher: Steps) -> None:
    """Have `watcher` told of `steps` from now on, in this thread and those that copy its context."""
    _steps.set(watcher)
