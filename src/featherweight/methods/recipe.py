"""Recipes: a point in the recipe space, as YAML on disk and as a frozen model in memory.

    name: ptqtp
    layers: {include: ["*"], skip: [q_proj, k_proj]}
    grid: {kind: trit-planes, planes: 2}
    rounding: {kind: nearest}
    overrides:
      - {match: down_proj, grid: {planes: 3}}

`include`, `skip` and `match` hold shell patterns that a layer meets with its full name, its last component (`q_proj`)
or its kind (`attention`, `mlp`, `expert`). Everything a recipe can get wrong is one RecipeError naming the field.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.quantize.base import Allocator, Choice, Correction, Grid, Rounding, Transform
from featherweight.plugins import OURS, plugin_presets
from featherweight.registry import find, nearest
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


class Selection(BaseModel):
    """Which linear layers are compressed; the others are copied."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    include: tuple[str, ...] = Field(("*",), description="patterns of layers to compress")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave as they are")
    head: bool = Field(False, description="also the output projection, if it is not tied to the embedding")
    routers: bool = Field(False, description="also the routers of mixtures of experts")


class Override(BaseModel):
    """Other settings for the layers a pattern matches; `grid` without `kind` changes settings of the recipe's grid."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    match: str
    grid: dict[str, Any]


class Recipe(BaseModel):
    """See the module. `transforms`, `rounding`, `corrections` and `allocation` name choices on the other axes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    title: str = ""
    paper: str = ""
    notes: str = ""
    layers: Selection = Selection()
    transforms: tuple[SerializeAsAny[Transform], ...] = ()
    grid: SerializeAsAny[Grid]
    rounding: SerializeAsAny[Rounding] = Field(default_factory=lambda: _choice("rounding", {"kind": "nearest"}))
    corrections: tuple[SerializeAsAny[Correction], ...] = ()
    allocation: SerializeAsAny[Allocator] = Field(default_factory=lambda: _choice("allocation", {"kind": "fixed"}))
    overrides: tuple[Override, ...] = ()
    calibration: CalibrationSettings = CalibrationSettings()

    @field_validator("grid", "rounding", "allocation", mode="before")
    @classmethod
    def _one(cls, value: Any, info: Any) -> Any:
        return _choice(info.field_name, value)

    @field_validator("transforms", "corrections", mode="before")
    @classmethod
    def _several(cls, value: Any, info: Any) -> Any:
        axis = info.field_name.removesuffix("s")
        if not isinstance(value, list | tuple):
            raise RecipeError(f"field {info.field_name} must be a list of choices, each with a kind")
        return tuple(_choice(axis, item, f"{info.field_name}[{i}]") for i, item in enumerate(value))

    @model_validator(mode="after")
    def _outermost_first(self) -> Recipe:
        """What a module does to its input is told by the outermost wrapper of its code."""
        kinds = [transform.kind for transform in self.transforms]
        if "quantize-inputs" in kinds[1:]:
            raise RecipeError("the transform quantize-inputs must be the first in transforms: put it before the others")
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
        return sum(choice.extra_bytes(shape) for choice in (*self.transforms, self.rounding, *self.corrections))

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What the recipe takes on the five axes."""
        return (*self.transforms, self.grid, self.rounding, *self.corrections, self.allocation)

    @property
    def calibrated(self) -> bool:
        """Whether the network must be run to apply this recipe."""
        return bool(self.needs) or any(getattr(choice, "scope", "layer") != "layer" for choice in self.choices)

    def grids_for(self, anatomy: Anatomy) -> dict[str, Grid]:
        """Layer name -> grid for every layer this recipe compresses, in model order.

        Raises RecipeError for a pattern that matches nothing and for a selection that is empty.
        """
        candidates = [layer for layer in anatomy.layers if self.layers.routers or layer.kind != "router"]
        if self.layers.head:
            if anatomy.head is None:
                raise RecipeError("layers.head is set, but the head of this model is tied to its embedding; unset it")
            candidates.append(anatomy.head)
        fields = {"layers.include": self.layers.include, "layers.skip": self.layers.skip}
        fields["overrides.match"] = tuple(o.match for o in self.overrides)
        for field, patterns in fields.items():
            for pattern in patterns:
                if not any(_matches(pattern, layer) for layer in candidates):
                    roles = sorted({layer.role for layer in candidates})
                    raise RecipeError(
                        f"recipe {self.name}: the pattern {pattern!r} in {field} matches no layer of this model"
                        f"{nearest(pattern, roles)}; layers here: {', '.join(roles)}"
                    )
        chosen = [
            layer
            for layer in candidates
            if any(_matches(p, layer) for p in self.layers.include)
            and not any(_matches(p, layer) for p in self.layers.skip)
        ]
        if not chosen:
            raise RecipeError(f"recipe {self.name}: layers.include and layers.skip leave no layer to compress")
        grids = {layer.name: self._grid_of(layer) for layer in chosen}
        return self.allocation.assign({layer.name: layer.shape for layer in chosen}, grids)

    def _grid_of(self, layer: LinearLayer) -> Grid:
        for i, override in enumerate(self.overrides):
            if _matches(override.match, layer):
                return _overridden(self.grid, override, i)
        return self.grid


def _overridden(grid: Grid, override: Override, place: int) -> Grid:
    kind = override.grid.get("kind", grid.kind)
    kept = grid.settings() if kind == grid.kind else {}
    built = _choice("grid", {**kept, **override.grid, "kind": kind}, f"overrides[{place}].grid")
    assert isinstance(built, Grid)
    return built


def _matches(pattern: str, layer: LinearLayer) -> bool:
    # Equality first: "experts.down_proj[3]", the name of a slice, is not the pattern it looks like.
    return any(t == pattern or fnmatch.fnmatchcase(t, pattern) for t in (layer.name, layer.role, layer.kind))


def _choice(axis: str, value: Any, field: str = "") -> Any:
    """A choice on `axis` from its mapping, or the choice itself."""
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


def recipe_from(mapping: Any, origin: str) -> Recipe:
    """A recipe from its mapping; RecipeError (with `origin`) where it is wrong."""
    if not isinstance(mapping, dict):
        raise RecipeError(f"recipe {origin}: a recipe is a mapping of fields, found {type(mapping).__name__}")
    try:
        return Recipe(**mapping)
    except ValidationError as error:
        raise RecipeError(f"recipe {origin}: {explain(error, _model_at(error))}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {origin}: {error}") from None
    except TypeError as error:
        raise RecipeError(f"recipe {origin}: {error}") from None


def _model_at(error: ValidationError) -> Any:
    inner = {"layers": Selection, "overrides": Override}
    location = error.errors()[0]["loc"]
    return inner.get(str(location[0]), Recipe) if len(location) > 1 else Recipe


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


def load_recipe(name: str | Path | Mapping[str, Any] | Recipe, changes: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A preset by name, a recipe file, or a mapping as such a file holds it (its `name` may be left out), with
    `changes` like "grid.planes=3" applied before validation.

    Raises RecipeError.
    """
    mapping: Any
    if isinstance(name, Recipe):
        if not changes:
            return name
        mapping, origin = name.dump(), name.name
    elif isinstance(name, Mapping):
        mapping = copy.deepcopy(dict(name))
        origin = str(mapping.setdefault("name", "custom"))
    else:
        path, origin = _recipe_file(str(name)), str(name)
        try:
            mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"recipe {origin} cannot be read: {reason}") from None
        if isinstance(mapping, dict):
            mapping.setdefault("name", path.stem)
    for change in changes:
        _apply(mapping, change)
    return recipe_from(mapping, origin)


def _recipe_file(name: str) -> Path:
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"there is no recipe file {name}")
    raise RecipeError(f"there is no recipe called {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def _apply(mapping: Any, change: str) -> None:
    """Set one field, "grid.planes=3"; the value is YAML."""
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
