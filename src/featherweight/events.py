"""The one way in which work says how it goes: an observer receives events, JSON-able mappings of facts.

Runs write every event to a log (`featherweight.storage.run.log`), the command draws progress from them, methods report
steps, losses and reasons with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Observer = Callable[[dict[str, Any]], None]
"""Receives events. A run's have the key "event"; what a method reports are facts such as step, loss, or a reason."""


def silent(event: dict[str, Any]) -> None:
    """An `Observer` that drops everything."""
