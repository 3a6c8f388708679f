"""Which work an output is of: the model, the recipe by what it computes, seed, text and release."""

from __future__ import annotations

from typing import Any

from featherweight.errors import FeatherError
from featherweight.methods.recipe import recipe_from


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
