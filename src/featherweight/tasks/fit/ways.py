"""What a layer may become in a fit: choices that compete, each with a name, from one plane to eight bits.

All are in a rotated basis, so that any of them can stand beside any other at no cost, and each is a treatment like a
recipe's. A preset is a way, too, under its own name, if all of its choices are of single layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.errors import RecipeError
from featherweight.methods.quantize.choosing import choice_on, choices_on
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.methods.recipe import load_recipe
from featherweight.registry import nearest

ROTATION: list[dict[str, Any]] = [{"kind": "hadamard"}]
PLANES = {"kind": "trit-planes", "group_size": 32, "scale_dtype": "log8", "fitting": "weighted"}
TIED = {**PLANES, "tied": True}
DESCENT = {"kind": "trit-descent", "alpha": 1.0, "damping": 0.1, "descent_damping": 0.05}
SWEEP = {"kind": "hessian", "alpha": 1.0, "damping": 0.1}
NAME = "fit"
"""Of the recipe that a fit makes."""


def _uniform(bits: int, group: int = 128) -> dict[str, Any]:
    return {"kind": "uniform", "bits": bits, "group_size": group, "symmetric": True, "clip": "mse"}


OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1 plane": ({**PLANES, "planes": 1}, {"kind": "trit-descent", "alpha": 0.5}),
    "2 planes": ({**TIED, "planes": 2, "tied_ratio": "3:2"}, DESCENT),
    "3 bits": (_uniform(3), SWEEP),
    "4 bits": (_uniform(4), SWEEP),
    "3 planes": ({**TIED, "planes": 3, "tied_ratio": "3:1"}, DESCENT),
    "5 bits": (_uniform(5), SWEEP),
    "6 bits": (_uniform(6), SWEEP),
    "8 bits": (_uniform(8), SWEEP),
}
"""Grid and rounding of the ways that compete unless others are named."""
END_BITS = (3, 4, 5, 6, 8)
"""Of embedding and output layer, in groups of 64: rounded under the output layer's moment where it is that, too."""


@dataclass(frozen=True)
class Way:
    """name : in tables and in the result
    transforms, grid, rounding, corrections : as a recipe file has them; all of single layers
    """

    name: str
    transforms: tuple[dict[str, Any], ...]
    grid: dict[str, Any]
    rounding: dict[str, Any]
    corrections: tuple[dict[str, Any], ...] = ()

    def treatment(self, *, data: bool = True, stored: bool = False) -> Treatment:
        """What a layer gets.

        data : with second moments; else rounded to the nearest
        stored : measured with a file of statistics, which knows nothing of the other stream: no shift towards it
        """
        rounding = self.rounding if data else {"kind": "nearest"}
        if stored and "alpha" in rounding:
            rounding = {**rounding, "alpha": 0.0}
        return Treatment(
            choice_on("grid", self.grid),
            choice_on("rounding", rounding),
            choices_on("transform", list(self.transforms), "transforms"),
            choices_on("correction", list(self.corrections), "corrections") if data else (),
        )

    def quick(self) -> Way:
        """The same grid with a sweep in the place of a descent: what an error is measured with, a tenth of the time."""
        if self.rounding["kind"] != "trit-descent":
            return self
        kept = {key: value for key, value in self.rounding.items() if key in ("alpha", "damping", "kind")}
        return Way(self.name, self.transforms, self.grid, {**kept, "kind": "hessian"}, self.corrections)

    def override(self, match: str, data: bool) -> dict[str, Any]:
        """An entry of a recipe's `overrides`, with all settings: what it leaves out would be the recipe's own."""
        return {"match": match, **self.treatment(data=data).settings()}


def own_ways() -> tuple[Way, ...]:
    """The ways that compete unless others are named."""
    rotation = tuple(ROTATION)
    return tuple(Way(name, rotation, dict(grid), dict(rounding)) for name, (grid, rounding) in OWN.items())


def ways_named(names: Sequence[str]) -> tuple[Way, ...]:
    """Ways by name: those of `OWN`, and presets. RecipeError for a name that is neither, or a preset that treats more
    than single layers."""
    known = {way.name: way for way in own_ways()}
    return tuple(known[name] if name in known else _of_preset(name, known) for name in names)


def _of_preset(name: str, known: Mapping[str, Way]) -> Way:
    try:
        recipe = load_recipe(name)
    except RecipeError as error:
        raise RecipeError(
            f"there is no choice {name!r}{nearest(name, known)}; choices: {', '.join(known)}, and presets ({error})"
        ) from None
    wide = [choice for choice in recipe.choices if scope_of(choice) != "layer"]
    if wide:
        raise RecipeError(
            f"the preset {name} cannot be a choice for single layers: its {wide[0].kind} treats a whole "
            f"{scope_of(wide[0])}"
        )
    return Way(
        name,
        tuple(choice.settings() for choice in recipe.transforms),
        recipe.grid.settings(),
        recipe.rounding.settings(),
        tuple(choice.settings() for choice in recipe.corrections),
    )


def end_ways() -> tuple[Way, ...]:
    """What embedding and output layer may become."""
    return tuple(Way(f"{bits} bits", (), _uniform(bits, 64), {"kind": "hessian"}) for bits in END_BITS)


@dataclass(frozen=True)
class Chosen:
    """A way for every layer; `ends` for the matrices outside the blocks, by the recipe's field."""

    layers: Mapping[str, Way]
    ends: Mapping[str, Way]


def recipe_of(
    chosen: Chosen, calibration: Mapping[str, Any], *, data: bool, corrections: Sequence[Any] = ()
) -> dict[str, Any]:
    """A recipe that gives every layer its way: that of most layers is the recipe's own, and others override it."""
    counts: dict[str, int] = {}
    for way in chosen.layers.values():
        counts[way.name] = counts.get(way.name, 0) + 1
    usual = max(counts, key=lambda name: (counts[name], name))
    own = next(way for way in chosen.layers.values() if way.name == usual)
    recipe: dict[str, Any] = {"name": NAME, **own.treatment(data=data).settings()}
    recipe["title"] = "A way for every layer, chosen by `feather fit`"
    recipe["corrections"] = [*recipe["corrections"], *corrections]
    overrides = []
    for name, way in chosen.layers.items():
        if way.name != usual:
            one = way.override(_literal(name), data)
            one["corrections"] = [*one["corrections"], *corrections]
            overrides.append(one)
    if overrides:
        recipe["overrides"] = overrides
    for field, way in chosen.ends.items():
        rounding = way.rounding if data and field == "head" else {"kind": "nearest"}
        recipe[field] = {"grid": dict(way.grid), "rounding": dict(rounding)}
    if data:
        recipe["calibration"] = dict(calibration)
    return recipe


def _literal(name: str) -> str:
    """A pattern that a name alone meets: experts have brackets in theirs."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)
