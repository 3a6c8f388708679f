"""Recipes as people name them, and changes as they write them: "grid.planes=3"."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from featherweight.errors import RecipeError, shown
from featherweight.registry import nearest

GGUF_TYPE = re.compile(r"(IQ|TQ|Q)\d(_\w+)?", re.IGNORECASE)
"""What people who come from llama.cpp may take for the name of a recipe."""
LIST = "`feather methods` lists the presets"


def no_recipe(path: Path, name: str, known: Iterable[str]) -> str:
    """Why a name is neither that of a preset nor of a file, and what is near to it."""
    if path.is_dir():
        return f"the recipe {name} is a folder: give a YAML file, or the name of a preset; {LIST}"
    if path.suffix in (".yaml", ".yml"):
        return f"there is no recipe file {name}; presets need none, and {LIST}"
    if GGUF_TYPE.fullmatch(name):
        return f"{name!r} is a type of llama.cpp, not a recipe: near in size are the presets four and trit-2; {LIST}"
    return f"there is no recipe called {name!r}{nearest(name, known)}; {LIST}"


def check_changes(changes: Any) -> Sequence[str]:
    """RecipeError unless changes are a list of strings: a single string is a sequence of letters in Python."""
    if isinstance(changes, list | tuple) and all(isinstance(change, str) for change in changes):
        return changes
    raise RecipeError(f"changes is {shown(changes)}, but must be a list of strings, like changes=['grid.bits=3']")


def apply_change(mapping: Any, change: str) -> None:
    """Set one field of a recipe's mapping, "grid.planes=3"; the value is YAML. RecipeError where it is none."""
    path, equals, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"a change is written FIELD=VALUE, like grid.planes=3, but is {change!r}")
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise RecipeError(f"the value of {change!r} is not valid YAML") from None
    place = mapping
    for key in keys[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise RecipeError(f"the change {change!r} names a field inside {key!r}, which is not a mapping")
    place[keys[-1]] = value


def recipe_mapping(
    name: str | Path | Mapping[str, Any] | BaseModel, changes: Sequence[str], file_of: Callable[[str], Path]
) -> tuple[Any, str]:
    """What a recipe of any kind says, with changes applied and nothing checked, and what errors call it.

    name : a recipe, which `dump`s itself, a mapping, or what `file_of` finds the file of
    """
    check_changes(changes)
    mapping: Any
    if isinstance(name, BaseModel):
        recipe: Any = name
        mapping, origin = recipe.dump(), recipe.name
    elif isinstance(name, Mapping):
        mapping = copy.deepcopy(dict(name))
        origin = str(mapping.setdefault("name", "custom"))
    else:
        path, origin = file_of(str(name)), str(name)
        try:
            mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"recipe {origin} cannot be read: {reason}") from None
        if isinstance(mapping, dict):
            mapping.setdefault("name", path.stem)
    for change in changes:
        apply_change(mapping, change)
    return mapping, origin
