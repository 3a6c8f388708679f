"""Recipes of trainings: a choice on each axis, as YAML on disk and as a frozen model in memory.

    title: ...
    forward: {kind: absmean, scope: tensor}
    backward: {kind: identity}
    side: {kind: none}
    activation: {kind: integers, bits: 8}
    schedule: {kind: trilm, learning_rate: 0.0015}
    optimiser: {kind: adamw, betas: [0.9, 0.95]}

Presets lie in `recipes/train/`. Everything a recipe can get wrong is one RecipeError naming the field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from featherweight.errors import RecipeError
from featherweight.methods.quantize.choosing import choice_on, explain
from featherweight.methods.quantize.written import recipe_mapping
from featherweight.methods.train.base import Activation, Backward, Forward, Schedule, Side, matches
from featherweight.methods.train.layer import Choices
from featherweight.registry import nearest
from featherweight.system.places import PRESETS

FOLDER = PRESETS / "train"
AXES = ("forward", "backward", "side", "activation", "schedule")


class TrainLayers(BaseModel):
    """Which linear layers are trained with rounded weights; the others are trained as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    include: tuple[str, ...] = Field(("*",), description="patterns of layers, by full name or its last part")
    skip: tuple[str, ...] = Field((), description="patterns of layers that stay as they are")

    @field_validator("include", "skip", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def takes(self, name: str) -> bool:
        """Whether the layer of this name is one of them."""
        return matches(self.include, name) and not matches(self.skip, name)


class TrainAttention(BaseModel):
    """What is done in attentions, beside their linear layers. No folder can hold it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    inputs: bool = Field(
        False, description="whether queries, keys, values and probabilities are rounded as inputs of layers are"
    )
    product: bool = Field(
        False, description="whether the product of each head's query and key matrix is rounded in their place (QKR)"
    )

    @property
    def unstorable(self) -> str:
        """Why a folder cannot hold it; empty where there is nothing of it."""
        wrong = [f"attention.{name}" for name in ("inputs", "product") if getattr(self, name)]
        return f"{' and '.join(wrong)} change attentions, which no folder can hold: leave them out" if wrong else ""


class OptimiserChoice(BaseModel):
    """An optimiser by its name in featherweight.methods.learn.optimisers, with its settings."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str = Field("adamw", description="its name: adamw, adam, sgd")

    def settings(self) -> dict[str, Any]:
        """All but the name; lists become tuples, as optimisers want them."""
        extra = self.model_extra or {}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in extra.items()}


class TrainRecipe(BaseModel):
    """How low-bit layers are trained: a choice on every axis.

    Attributes
    ----------
    name : of the preset, the file's stem, or one's own; `title`, `paper` and `notes` describe it
    layers : which linear layers; token embedding, output layer and norms are never among them
    attention : what is done in attentions beside their linear layers
    forward, backward, side, activation : see `featherweight.methods.train.base`
    schedule : learning rate and weight decay over the steps
    optimiser : of latents and everything else
    clip : most norm of the gradient; 0 for no limit
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="of the recipe; where a file does not give it, the file's own name")
    title: str = Field("", description="what it is, in a line")
    paper: str = Field("", description="where it comes from")
    notes: str = Field("", description="what else is worth knowing")
    layers: TrainLayers = Field(TrainLayers(), description="which linear layers are trained with rounded weights")
    attention: TrainAttention = Field(TrainAttention(), description="what is done in attentions beside their layers")
    forward: SerializeAsAny[Forward]
    backward: SerializeAsAny[Backward] = Field(default_factory=lambda: choice_on("backward", {"kind": "identity"}))
    side: SerializeAsAny[Side] = Field(default_factory=lambda: choice_on("side", {"kind": "none"}))
    activation: SerializeAsAny[Activation] = Field(default_factory=lambda: choice_on("activation", {"kind": "none"}))
    schedule: SerializeAsAny[Schedule] = Field(default_factory=lambda: choice_on("schedule", {"kind": "cosine"}))
    optimiser: OptimiserChoice = Field(
        OptimiserChoice(kind="adamw", betas=[0.9, 0.95]),
        description="a kind of featherweight.methods.learn.optimisers with its settings",
    )
    clip: float = Field(1.0, ge=0, description="most norm of a step's gradient; 0: no limit")

    @field_validator(*AXES, mode="before")
    @classmethod
    def _one(cls, value: Any, info: Any) -> Any:
        return choice_on(info.field_name, value)

    @model_validator(mode="after")
    def _together(self) -> TrainRecipe:
        refusal = self.choices.refusal()
        if self.attention.inputs and self.activation.kind == "none":
            refusal = refusal or "attention.inputs rounds as the activation says, which is none: choose an activation"
        if self.attention.product and self.side.kind != "none":
            refusal = (
                refusal or f"attention.product has no side path, and the side {self.side.kind} is chosen: take none"
            )
        if refusal:
            raise RecipeError(refusal)
        return self

    @property
    def choices(self) -> Choices:
        """What each layer gets."""
        return Choices(self.forward, self.backward, self.side, self.activation)

    def dump(self) -> dict[str, Any]:
        """JSON-able form that `train_recipe` reads back to an equal recipe."""
        plain = self.model_dump(mode="json", exclude=set(AXES), exclude_defaults=True)
        return plain | {axis: getattr(self, axis).settings() for axis in AXES}

    def digest(self) -> str:
        """SHA-256 of what the recipe computes, free of its title and notes."""
        plain = {k: v for k, v in self.dump().items() if k not in ("name", "title", "paper", "notes")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def train_presets() -> dict[str, Path]:
    """Name -> file of every preset of trainings."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def train_recipe(name: str | Path | Mapping[str, Any] | TrainRecipe, changes: Sequence[str] = ()) -> TrainRecipe:
    """Read and check a recipe of a training.

    Parameters
    ----------
    name : str, Path, mapping or TrainRecipe
        A preset, a YAML file, or a mapping as such a file holds it.
    changes : list or tuple of str
        Like "forward.scope=row", applied before anything is checked.

    Raises
    ------
    RecipeError
        There is no such preset or file, it holds what no recipe has, or its choices do not go together.
    """
    if isinstance(name, TrainRecipe) and not changes:
        return name
    mapping, origin = recipe_mapping(name, changes, _file_of)
    if not isinstance(mapping, dict):
        raise RecipeError(f"recipe {origin}: a recipe is a mapping of fields, found {type(mapping).__name__}")
    try:
        return TrainRecipe(**mapping)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        parts: dict[Any, type[BaseModel]] = {"layers": TrainLayers, "attention": TrainAttention}
        model = parts.get(place[0], TrainRecipe) if len(place) > 1 else TrainRecipe
        raise RecipeError(f"recipe {origin}: {explain(error, model)}") from None
    except (RecipeError, TypeError) as error:
        raise RecipeError(f"recipe {origin}: {error}") from None


def _file_of(name: str) -> Path:
    known = train_presets()
    path = known.get(name, Path(name))
    if path.is_file():
        return path
    raise RecipeError(
        f"there is no recipe of trainings called {name!r}{nearest(name, known)}; presets: {', '.join(known)}; or "
        "give a YAML file"
    )
