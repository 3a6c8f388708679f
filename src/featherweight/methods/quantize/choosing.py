"""From mappings, as recipes hold them, to choices on the axes; what is wrong is one sentence naming the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import Choice
from featherweight.registry import find, nearest

C = TypeVar("C", bound=Choice)


def choice_on(axis: str, value: Any, field: str = "") -> Any:
    """The choice on an axis that a mapping with a `kind` stands for; a choice is returned as it is.

    Parameters
    ----------
    axis : "grid", "rounding", "transform", "correction" or "allocation"
    field : what errors call the mapping; the axis if empty

    Raises
    ------
    RecipeError
        Where there is no such kind or setting, or a setting has a wrong value.
    """
    field = field or axis
    if isinstance(value, Choice):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise RecipeError(f"field {field} must be a mapping with a kind, like {{kind: ...}}, but is {value!r}")
    cls = find(axis, value["kind"])
    try:
        return cls(**{k: v for k, v in value.items() if k != "kind"})
    except ValidationError as error:
        raise RecipeError(explain(error, cls, f"{field}.")) from None


def choices_on(axis: str, values: Any, field: str) -> tuple[Any, ...]:
    """`choice_on` for a list of mappings; RecipeError where it is no list."""
    if not isinstance(values, list | tuple):
        raise RecipeError(f"field {field} must be a list of choices, each with a kind")
    return tuple(choice_on(axis, item, f"{field}[{i}]") for i, item in enumerate(values))


def with_settings(axis: str, choice: C, settings: Mapping[str, Any], field: str) -> C:
    """The choice with some settings changed; with another `kind` among them, another choice on the axis.

    Raises RecipeError as `choice_on` does.
    """
    kind = settings.get("kind", choice.kind)
    kept = choice.settings() if kind == choice.kind else {}
    return cast(C, choice_on(axis, {**kept, **settings, "kind": kind}, field))


def explain(error: ValidationError, model: Any, prefix: str = "") -> str:
    """The first problem of a pydantic error as one sentence with the field's full name."""
    first = error.errors()[0]
    field = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return f"there is no field {field}{nearest(str(first['loc'][-1]), known)}; known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"field {field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"field {field} is {first['input']!r}: {message[0].lower()}{message[1:]}"
