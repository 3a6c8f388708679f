"""From mappings, as recipes hold them, to choices on the axes; what is wrong is one sentence naming the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from featherweight.errors import RecipeError, shown
from featherweight.methods.quantize.base import Choice
from featherweight.registry import find, nearest
from featherweight.version import __version__

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
        kind = values if isinstance(values, str) else "NAME"
        wanted = f"a list of choices, each with a kind, like [{{kind: {kind}}}]"
        raise RecipeError(f"field {field} must be {wanted}, but is {shown(values)}")
    return tuple(choice_on(axis, item, f"{field}[{i}]") for i, item in enumerate(values))


def with_settings(axis: str, choice: C, settings: Mapping[str, Any], field: str) -> C:
    """The choice with some settings changed; with another `kind` among them, another choice on the axis.

    Raises RecipeError as `choice_on` does.
    """
    kind = settings.get("kind", choice.kind)
    kept = choice.settings() if kind == choice.kind else {}
    return cast(C, choice_on(axis, {**kept, **settings, "kind": kind}, field))


def first_of(error: ValidationError) -> Any:
    """The problem of a pydantic error to name: a name that is not known before one that is missing for it."""
    found = error.errors()
    return next((one for one in found if one["type"] == "extra_forbidden"), found[0])


def explain(error: ValidationError, model: Any, prefix: str = "", fields: Any = None) -> str:
    """The first problem of a pydantic error as one sentence with the field's full name.

    fields : the model of a whole recipe, where settings of choices may have been written beside the choices
    """
    first = first_of(error)
    field = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known, name = list(model.model_fields), str(first["loc"][-1])
        if fields is not None and model is fields and (inner := _inside(name)):
            return f"there is no field {field} (did you mean {inner!r}?)"
        guess = nearest(name, known)
        later = "" if guess else f"; this is featherweight {__version__}, and recipes for another one may have others"
        return f"there is no field {field}{guess}; known: {', '.join(known)}{later}"
    if first["type"] == "missing":
        return f"field {field} is missing"
    if first["type"] in WANTED:
        return f"field {field} is {shown(first['input'])}, but must be {WANTED[first['type']]}"
    message = first["msg"].removeprefix("Value error, ")
    return f"field {field} is {first['input']!r}: {message[0].lower()}{message[1:]}"


WANTED = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list, like [...]"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of fields, like {name: value}"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number (an integer)"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "a text",
}
"""Kinds of pydantic's errors -> what a recipe should have had there."""


INSIDE = {
    **dict.fromkeys(("bits", "group_size", "symmetric", "planes"), "grid"),
    **dict.fromkeys(("sequences", "length", "guidance"), "calibration"),
    **dict.fromkeys(("include", "skip"), "layers"),
}
"""Settings that people look for at the top of a recipe -> the field that has them."""


def _inside(name: str) -> str:
    return f"{INSIDE[name]}.{name}" if name in INSIDE else ""
