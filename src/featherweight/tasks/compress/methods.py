"""The Rosetta table: every preset as a point in the recipe space. docs/methods.md is generated from it."""

from __future__ import annotations

import warnings
from typing import Any

from featherweight.errors import FeatherWarning, RecipeError
from featherweight.methods.quantize.base import Choice
from featherweight.methods.quantize.ends import end_treatment
from featherweight.methods.recipe import Recipe, load_recipe, preset_origin, presets
from featherweight.plugins import OURS
from featherweight.registry import PACKAGES, origin, registered
from featherweight.storage.codes import code_layout
from featherweight.tasks.compress.plan import tokens_a_step

HELD = {"tensor": "one tensor", "block": "one block", "model": "whole model"}
WHOLE_ROW = 1 << 30  # the group size that presets with a scale a row have
TYPICAL = (4096, 4096)  # the shape for which bits per weight are stated


def method_table() -> list[dict[str, Any]]:
    """A row a preset: the five axes in words, needs, true bits per weight of a 4096 x 4096 matrix, cost, paper.

    The cost is what a machine cannot change: how much of the network is in memory, how many tokens run through it to
    be seen, and how many forwards and backwards in trainings. `feather plan` measures seconds, on a model. `from` is
    the distribution that brings the preset; one of another package that cannot be read is a FeatherWarning.
    """
    rows = []
    for name in presets():
        source = preset_origin(name)
        try:
            rows.append(_row(load_recipe(name), source))
        except RecipeError as error:
            if source == OURS:
                raise
            warnings.warn(f"the preset {name!r} of {source} is left out: {error}", FeatherWarning, stacklevel=2)
    return rows


def _row(recipe: Recipe, source: str) -> dict[str, Any]:
    codes = sum(tensor.nbytes for tensor in code_layout(recipe.grid.spec(TYPICAL)).values())
    nbytes = codes + recipe.extra_bytes(TYPICAL)
    return {
        "preset": recipe.name,
        "from": source,
        "title": recipe.title,
        "paper": recipe.paper,
        "notes": recipe.notes,
        "transform": _join(recipe.transforms),
        "grid": _words(recipe.grid),
        "rounding": _words(recipe.rounding),
        "correction": _join(recipe.corrections),
        "allocation": _words(recipe.allocation),
        "outside": _outside(recipe),
        "needs": _needs(recipe),
        "bits": round(8 * nbytes / (TYPICAL[0] * TYPICAL[1]), 4),
        **_cost(recipe),
        "recipe": recipe.dump(),
    }


def _outside(recipe: Recipe) -> str:
    """What becomes of token embedding and output layer."""
    found = {}
    for field, end in recipe.ends.items():
        treatment = end_treatment(end, field, recipe.treatment)
        found[field] = "kept" if treatment is None else "same" if end == "same" else _words(treatment.grid)
    texts = list(dict.fromkeys(found.values()))
    return texts[0] if len(texts) == 1 else ", ".join(f"{field} {text}" for field, text in found.items())


def _needs(recipe: Recipe) -> str:
    """What must be at hand beside the weights."""
    if not recipe.calibrated:
        return "no data"
    wide = {getattr(choice, "scope", "layer") for choice in recipe.choices} - {"layer"}
    guided = ["gradients"] * bool(recipe.calibration.guidance)
    return ", ".join(["text", *recipe.needs, *guided, *(f"whole {scope}" for scope in sorted(wide))])


def _cost(recipe: Recipe) -> dict[str, Any]:
    if not recipe.calibrated:
        return {"memory": "tensor", "seen_tokens": 0, "trained_tokens": 0}
    wide = any(getattr(choice, "scope", "layer") == "model" for choice in recipe.choices)
    settings = recipe.calibration
    trained = sum(
        int(getattr(choice, "steps", 0)) * tokens_a_step(choice, settings)
        for choice in recipe.choices
        if choice.training_bytes
    )
    return {
        "memory": "model" if wide or "fisher" in recipe.needs else "block",
        "seen_tokens": settings.sequences * settings.length,
        "trained_tokens": trained,
    }


def cost_text(row: dict[str, Any]) -> str:
    """One row's cost in words."""
    parts = [HELD[row["memory"]]]
    if row["seen_tokens"]:
        parts.append(f"{_thousands(row['seen_tokens'])} tokens")
    if row["trained_tokens"]:
        parts.append(f"{_thousands(row['trained_tokens'])} trained")
    return ", ".join(parts)


def _thousands(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count >= 10**6 else f"{count / 1e3:.3g} k"


def _join(choices: tuple[Choice, ...]) -> str:
    return ", ".join(_words(choice) for choice in choices) or "-"


def _words(choice: Choice) -> str:
    """`kind` and the settings that differ from their defaults."""
    changed = [
        f"{name} {'row' if value == WHOLE_ROW else value}" if not isinstance(value, bool) else name
        for name, value in choice.model_dump().items()
        if value != type(choice).model_fields[name].default
    ]
    return " ".join([choice.kind, *([f"({', '.join(changed)})"] if changed else [])])


def choices_table() -> list[dict[str, Any]]:
    """Every registered choice on every axis with its settings, for the documentation."""
    rows = []
    for axis in PACKAGES:
        for name, cls in registered(axis).items():
            if not issubclass(cls, Choice):  # a code or a statistic, which has no settings
                continue
            fields = [
                {"name": f, "default": info.default, "description": info.description or ""}
                for f, info in cls.model_fields.items()
            ]
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            source = origin(axis, name)
            rows.append({"axis": axis, "name": name, "from": source, "summary": summary, "settings": fields})
    return rows


def added_choices() -> list[dict[str, str]]:
    """Axis, name and distribution (`from`) of every choice, statistic and kind of code that is not from here."""
    known = [{"axis": axis, "name": name, "from": origin(axis, name)} for axis in PACKAGES for name in registered(axis)]
    return [row for row in known if row["from"] != OURS]
