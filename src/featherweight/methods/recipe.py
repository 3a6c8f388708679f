"""Recipes: a point in the recipe space, as YAML on disk and as a frozen model in memory.

    name: ptqtp
    layers: {include: ["*"], skip: [q_proj, k_proj]}
    grid: {kind: trit-planes, planes: 2}
    rounding: {kind: nearest}
    overrides:
      - {match: down_proj, grid: {planes: 3}}
      - {match: q_proj, rounding: {kind: hessian}, corrections: [{kind: lorc}]}

`include`, `skip` and `match` hold shell patterns that a layer meets with its full name, its last component (`q_proj`)
or its kind (`attention`, `mlp`, `expert`). Everything a recipe can get wrong is one RecipeError naming the field.

From the recipe and its overrides each layer has a `Treatment`: on every axis the first override that matches the layer
and names the axis counts, and the recipe's own choice where there is none.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from featherweight.errors import RecipeError
from featherweight.methods.budget.base import Allocator
from featherweight.methods.calibrate.settings import CalibrationSettings, ConversationSettings
from featherweight.methods.quantize.base import Choice, Correction, Grid, Rounding, Transform
from featherweight.methods.quantize.choosing import choice_on, choices_on, explain, first_of, with_settings
from featherweight.methods.quantize.ends import FIELDS as ENDS
from featherweight.methods.quantize.ends import End, EndChoices, end_treatment, ends_of, own_choices, read_end
from featherweight.methods.quantize.treatment import Treatment, check_order, scope_of
from featherweight.methods.quantize.written import no_recipe, recipe_mapping
from featherweight.plugins import OURS, plugin_presets
from featherweight.registry import nearest
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.run.identity import WORDS
from featherweight.system.places import PRESETS

__all__ = [
    "WORDS",
    "Override",
    "Recipe",
    "Selection",
    "explain",
    "load_recipe",
    "preset_origin",
    "presets",
    "recipe_from",
]

AXES = ("transforms", "grid", "rounding", "corrections")
"""What overrides may change, and a treatment consists of."""


class Selection(BaseModel):
    """Which linear layers are compressed; the others are copied."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    include: tuple[str, ...] = Field(("*",), description="patterns of layers to compress")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave as they are")
    head: bool = Field(False, description="also the output layer: the same as `head: same` of the recipe")
    routers: bool = Field(False, description="also the routers of mixtures of experts")

    @field_validator("include", "skip", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Override(BaseModel):
    """Other choices for the layers a pattern matches.

    `grid` and `rounding` without a `kind` change settings of the recipe's own; `transforms` and `corrections` take the
    place of the recipe's lists. Choices that see a whole block or model are the same for all layers; but layers may do
    without those of block scope.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    match: str = Field(description="pattern of the layers that it is for")
    grid: dict[str, Any] | None = Field(None, description="another grid, or settings of the recipe's own")
    rounding: dict[str, Any] | None = Field(None, description="another rounding, or settings of the recipe's own")
    transforms: tuple[dict[str, Any], ...] | None = Field(None, description="in place of the recipe's list")
    corrections: tuple[dict[str, Any], ...] | None = Field(None, description="in place of the recipe's list")

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if all(getattr(self, axis) is None for axis in AXES):
            raise ValueError("an override must name at least one of grid, rounding, transforms and corrections")
        return self


class Recipe(BaseModel):
    """How a model is compressed: a choice on every axis, and what single layers get instead.

    Fields take a choice, or what a recipe file holds in its place: {"kind": "trit-planes", "planes": 2}.

    Attributes
    ----------
    name : of the preset, the file's stem, or one's own; `title`, `paper` and `notes` describe it
    layers : which layers of the blocks are compressed
    transforms : changes of basis, the outermost first
    grid, rounding : the values that weights may take, and how one of them is chosen for each weight
    corrections : what makes good of the error that is left
    allocation : how much each layer gets
    overrides : choices for layers that match a pattern, on any axis but allocation; the first match counts
    embedding, head : what is outside the blocks: "keep", "same", or a grid and rounding of their own
    calibration : how much text is run, and how statistics are gathered

    Raises
    ------
    pydantic.ValidationError : a field does not fit; `load_recipe` makes a `RecipeError` of it that names the field
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="of the recipe; where a file does not give it, the file's own name")
    title: str = Field("", description="what it is, in a line")
    paper: str = Field("", description="where it comes from")
    notes: str = Field("", description="what else is worth knowing; neither title nor notes change any result")
    layers: Selection = Field(Selection(), description="which layers of the blocks are compressed")
    transforms: tuple[SerializeAsAny[Transform], ...] = ()
    grid: SerializeAsAny[Grid]
    rounding: SerializeAsAny[Rounding] = Field(default_factory=lambda: choice_on("rounding", {"kind": "nearest"}))
    corrections: tuple[SerializeAsAny[Correction], ...] = ()
    allocation: SerializeAsAny[Allocator] = Field(default_factory=lambda: choice_on("allocation", {"kind": "fixed"}))
    overrides: tuple[Override, ...] = Field((), description="other choices for layers that match a pattern")
    embedding: End = Field("keep", description="keep, same, or a grid (and rounding) of the token embedding's own")
    head: End = Field("keep", description="keep, same, or a grid (and rounding) of the output layer's own")
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="text, and how statistics are gathered")

    @field_validator("grid", "rounding", "allocation", mode="before")
    @classmethod
    def _one(cls, value: Any, info: Any) -> Any:
        return choice_on(info.field_name, value)

    @field_validator("transforms", "corrections", mode="before")
    @classmethod
    def _several(cls, value: Any, info: Any) -> Any:
        return choices_on(info.field_name.removesuffix("s"), value, info.field_name)

    @field_validator(*ENDS, mode="before")
    @classmethod
    def _end(cls, value: Any, info: Any) -> Any:
        return read_end(value, info.field_name)

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        """Overrides and candidates are made once, so that what is wrong in them is said where the recipe is read."""
        check_order(self.transforms)
        self._overriding()
        for field, end in self.ends.items():
            end_treatment(end, field, self.treatment)
        self.allocation.treatments(self.treatment)
        return self

    def dump(self) -> dict[str, Any]:
        """JSON-able form that `recipe_from` reads back to an equal recipe."""
        plain = self.model_dump(
            mode="json", exclude={"grid", "rounding", "allocation", "transforms", "corrections"}, exclude_defaults=True
        )
        plain |= {"grid": self.grid.settings(), "rounding": self.rounding.settings()}
        plain |= {"allocation": self.allocation.settings()}
        if not self.calibrated:
            plain.pop("calibration", None)
        plain |= {name: [c.settings() for c in getattr(self, name)] for name in ("transforms", "corrections")}
        return plain

    def digest(self) -> str:
        """SHA-256 of what the recipe computes, free of its title and notes."""
        plain = {k: v for k, v in self.dump().items() if k not in ("title", "paper", "notes")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that any choice declares; empty for a data-free recipe."""
        return tuple(sorted({name for choice in self.choices for name in choice.needs}))

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes stored for a matrix beside the codes of its grid, as far as they can be told without data."""
        return self.treatment.extra_bytes(shape)

    @property
    def treatment(self) -> Treatment:
        """What is done to layers that no override matches."""
        return Treatment(self.grid, self.rounding, self.transforms, self.corrections)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What the recipe takes on the five axes, and after that what its overrides take."""
        others = [choice for changed in self._overriding() for choice in _all_choices(changed)]
        for field, end in self.ends.items():
            others += own_choices(end, field, self.treatment)
        return (*self.treatment.choices, self.allocation, *others)

    @property
    def ends(self) -> dict[str, End]:
        """What `embedding` and `head` say; `layers.head` is another way to say `head: same`."""
        same = self.layers.head and self.head == "keep"
        return {"embedding": self.embedding, "head": "same" if same else self.head}

    @property
    def calibrated(self) -> bool:
        """Whether the network must be run to apply this recipe."""
        return bool(self.needs) or any(scope_of(choice) != "layer" for choice in self.choices)

    def treatments_for(self, anatomy: Anatomy) -> dict[str, Treatment]:
        """Layer name -> treatment for every layer this recipe compresses, in model order.

        Raises RecipeError for a pattern that matches nothing and for a selection that is empty.
        """
        overriding = self._overriding()
        made: dict[tuple[int | None, ...], Treatment] = {}  # layers that are alike share one object
        found = {}
        own = self._own_treatments(anatomy)
        for layer in self._chosen(anatomy):
            if layer.name in own:
                found[layer.name] = own[layer.name]
                continue
            places = self._overridden_by(layer)
            if places not in made:
                usual = {axis: getattr(self, axis) for axis in AXES}
                changed = {a: overriding[i][a] for a, i in zip(AXES, places, strict=True) if i is not None}
                made[places] = Treatment(**{**usual, **changed})
            found[layer.name] = made[places]
        return found

    def candidates_for(self, anatomy: Anatomy) -> dict[str, tuple[Treatment, ...]]:
        """The treatments the allocation may choose from, by layer; a grid that an override names is kept.

        Raises the errors of `treatments_for`.
        """
        named = {layer.name: self._overridden_by(layer)[AXES.index("grid")] for layer in self._chosen(anatomy)}
        own = self._own_treatments(anatomy)
        alike: dict[int, tuple[Treatment, ...]] = {}
        found: dict[str, tuple[Treatment, ...]] = {}
        for name, treatment in self.treatments_for(anatomy).items():
            if named[name] is not None or name in own:
                found[name] = (treatment,)
                continue
            if id(treatment) not in alike:
                alike[id(treatment)] = self.allocation.treatments(treatment)
            found[name] = alike[id(treatment)]
        return found

    def _chosen(self, anatomy: Anatomy) -> list[LinearLayer]:
        """The layers that are compressed."""
        candidates = [layer for layer in anatomy.layers if self.layers.routers or layer.kind != "router"]
        candidates += [layer for layer, _ in ends_of(anatomy, self.ends, self.name)]
        if self.layers.head and anatomy.head is None and anatomy.tied_head is None:
            raise RecipeError("layers.head is set, but this model has no output layer; unset it")
        own = self._own_treatments(anatomy)
        fields = {"layers.include": self.layers.include, "layers.skip": self.layers.skip}
        fields["overrides.match"] = tuple(o.match for o in self.overrides)
        for field, patterns in fields.items():
            for pattern in patterns:
                if not any(_matches(pattern, layer) for layer in candidates):
                    roles = sorted({layer.role for layer in candidates})
                    near = nearest(pattern, [*roles, *sorted({layer.kind for layer in candidates})])
                    raise RecipeError(
                        f"recipe {self.name}: the pattern {pattern!r} in {field} matches no layer of this model"
                        f"{near}; layers here: {', '.join(roles)}"
                    )
        chosen = [
            layer
            for layer in candidates
            if layer.name in own
            or (
                any(_matches(p, layer) for p in self.layers.include)
                and not any(_matches(p, layer) for p in self.layers.skip)
            )
        ]
        if not chosen:
            raise RecipeError(f"recipe {self.name}: layers.include and layers.skip leave no layer to compress")
        return chosen

    def _own_treatments(self, anatomy: Anatomy) -> dict[str, Treatment]:
        """Of matrices outside the blocks that have choices of their own, by layer."""
        found = {}
        for layer, field in ends_of(anatomy, self.ends, self.name):
            end = self.ends[field]
            treatment = end_treatment(end, field, self.treatment) if isinstance(end, EndChoices) else None
            if treatment is not None:
                found[layer.name] = treatment
        return found

    def _overridden_by(self, layer: LinearLayer) -> tuple[int | None, ...]:
        """For each of the AXES, which override counts for the layer; None where none does."""
        matching = [i for i, override in enumerate(self.overrides) if _matches(override.match, layer)]
        return tuple(next((i for i in matching if getattr(self.overrides[i], a) is not None), None) for a in AXES)

    def _overriding(self) -> list[dict[str, Any]]:
        """What each override puts in the place of the recipe's own choices, by axis.

        Raises RecipeError naming the field, also where a choice is none of single layers.
        """
        found = []
        for place, override in enumerate(self.overrides):
            field = f"overrides[{place}]"
            changed: dict[str, Any] = {}
            for axis, own in (("grid", self.grid), ("rounding", self.rounding)):
                settings = getattr(override, axis)
                if settings is not None:
                    changed[axis] = with_settings(axis, own, settings, f"{field}.{axis}")
            for axis in ("transforms", "corrections"):
                listed = getattr(override, axis)
                if listed is not None:
                    changed[axis] = choices_on(axis.removesuffix("s"), listed, f"{field}.{axis}")
                    _check_wide(changed[axis], getattr(self, axis), f"{field}.{axis}")
            check_order(changed.get("transforms", ()), f"{field}.transforms")
            rounding = changed.get("rounding", self.rounding)
            if scope_of(rounding) != "layer" and rounding != self.rounding:
                raise RecipeError(
                    f"{field}.rounding: {rounding.kind} chooses the codes of a whole {scope_of(rounding)} together, so "
                    "single layers cannot have it or settings of their own for it; they may only opt out, with a "
                    "rounding of layers such as {kind: nearest}"
                )
            found.append(changed)
        return found


def _check_wide(listed: tuple[Choice, ...], own: tuple[Choice, ...], field: str) -> None:
    """RecipeError where an override's list differs from the recipe's in what no layer can have by itself."""
    for choice in listed:
        if scope_of(choice) != "layer" and choice not in own:
            raise RecipeError(
                f"{field}: {choice.kind} sees a whole {scope_of(choice)} at once, so single layers cannot have it or "
                f"settings of their own for it; put it into the recipe's {field.rpartition('.')[2]}"
            )
    for choice in own:
        if scope_of(choice) == "model" and choice not in listed:
            raise RecipeError(
                f"{field}: {choice.kind} changes the whole model at once, so no layer can be without it; list it too"
            )


def _all_choices(changed: dict[str, Any]) -> list[Choice]:
    """The choices of an override that was resolved, those in lists one by one."""
    return [choice for value in changed.values() for choice in (value if isinstance(value, tuple) else (value,))]


def _matches(pattern: str, layer: LinearLayer) -> bool:
    # Equality first: "experts.down_proj[3]", the name of a slice, is not the pattern it looks like.
    return any(t == pattern or fnmatch.fnmatchcase(t, pattern) for t in (layer.name, layer.role, layer.kind))


def recipe_from(mapping: Any, origin: str) -> Recipe:
    """A recipe from its mapping; RecipeError (with `origin`) where it is wrong."""
    if not isinstance(mapping, dict):
        raise RecipeError(f"recipe {origin}: a recipe is a mapping of fields, found {type(mapping).__name__}")
    if "recipe" in mapping and "grid" not in mapping:
        raise RecipeError(
            f"recipe {origin} is not one itself, but has the recipe of a compressed folder in its field recipe: write "
            "that field's content into a file of its own for --recipe"
        )
    try:
        return Recipe(**mapping)
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: {explain(error, _model_at(error), fields=Recipe)}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {origin}: {error}") from None
    except TypeError as error:
        raise RecipeError(f"recipe {origin}: {error}") from None


def _model_at(error: ValidationError) -> Any:
    models = {"layers": Selection, "overrides": Override, "calibration": CalibrationSettings}
    outer, *inner = [part for part in first_of(error)["loc"][:-1] if isinstance(part, str)] or [""]
    return ConversationSettings if inner == ["conversations"] else models.get(outer, Recipe)


def presets() -> dict[str, Path]:
    """Name -> file of every preset: those that come with the package, then those of plug-ins."""
    own = _own_presets()
    return own | {name: path for name, (path, _) in plugin_presets(frozenset(own)).items()}


def preset_origin(name: str) -> str:
    """Where a preset comes from: "featherweight", or another distribution's name and version."""
    own = _own_presets()
    return OURS if name in own else plugin_presets(frozenset(own))[name][1]


def _own_presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"), key=lambda p: p.stem)}


def load_recipe(name: str | Path | Mapping[str, Any] | Recipe, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Parameters
    ----------
    name : str, Path, mapping or Recipe
        A preset, a YAML file, or a mapping as such a file holds it, whose `name` may be left out.
    changes : list or tuple of str, no single string
        Like "grid.planes=3", applied before anything is checked.

    Returns
    -------
    Recipe
        The recipe itself where it is one already and nothing is changed.

    Raises
    ------
    RecipeError
        There is no such preset or file, or it holds what no recipe has; the field and the nearest valid name are named.
    """
    if isinstance(name, Recipe) and not changes:
        return name
    return recipe_from(*recipe_mapping(name, changes, _recipe_file))


def _recipe_file(name: str) -> Path:
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    raise RecipeError(no_recipe(path, name, known))
