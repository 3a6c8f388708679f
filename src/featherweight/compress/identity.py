"""Which work an output is of: the model, the recipe by what it computes, seed, text and release."""

from __future__ import annotations

from typing import Any

from featherweight.errors import FeatherError
from featherweight.quantize.recipe import WORDS, recipe_from


def same_identity(one: Any, other: Any) -> bool:
    """Whether two identities are of the same work: recipes by what they compute, not by their words or their names."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    return {**one, "recipe": meaning_of(one.get("recipe"))} == {**other, "recipe": meaning_of(other.get("recipe"))}


def meaning_of(recipe: Any) -> Any:
    """What a recipe computes, as a digest of its settings and those it leaves to their defaults."""
    try:
        return recipe_from(recipe, "of an output").model_copy(update={"name": ""}).digest()
    except FeatherError:  # of another release: settings that this one does not know
        return recipe


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    for key in wanted:
        if found.get(key) == wanted[key] or key in WORDS:
            continue
        if isinstance(wanted[key], dict) and isinstance(found.get(key), dict):
            return f"{key}: {difference(found[key], wanted[key])}"
        return f"{key} was {found.get(key)!r}, now {wanted[key]!r}"
    return "it is damaged" if not found else "it holds further settings"
