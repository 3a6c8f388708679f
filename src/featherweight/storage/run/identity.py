"""Which work a folder is of: JSON-able facts (model, recipe, seed, text, release) that two runs are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WORDS = ("name", "title", "paper", "notes")
"""Fields that say what a recipe is, and change nothing that it computes."""

Same = Callable[[Any, Any], bool]
"""Whether two identities are of the same work; what reads recipes compares them by what they compute."""


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    for key in wanted:
        if found.get(key) == wanted[key] or key in WORDS:
            continue
        if isinstance(wanted[key], dict) and isinstance(found.get(key), dict):
            return f"{key}: {difference(found[key], wanted[key])}"
        return f"{key} was {found.get(key)!r}, now {wanted[key]!r}"
    return "it is damaged" if not found else "it holds further settings"
