"""What is done to one layer: its transforms, grid, rounding and corrections.

A recipe gives every layer a treatment; most layers of a model share one, and overrides give some of them others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import Choice, Correction, Grid, Rounding, Transform
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.storage.codes import code_layout

FIRST = "quantize-inputs"  # what a module does to its input is told by the outermost wrapper of its code


def scope_of(choice: Choice) -> str:
    """How much of the network a choice sees at once: "layer", "block" or "model"."""
    return str(getattr(choice, "scope", "layer"))


@dataclass(frozen=True)
class Treatment:
    """The choices for one layer on the axes that belong to layers.

    Choices of block and model scope are in the treatments of all layers they act on: a layer that lacks one of block
    scope is left out when that choice comes to its block.

    Attributes
    ----------
    grid : the values weights may take
    rounding : which of them each weight gets
    transforms : changes of basis before rounding, in the order in which they are applied
    corrections : terms beside the codes, each for what the one before left
    """

    grid: Grid
    rounding: Rounding
    transforms: tuple[Transform, ...] = ()
    corrections: tuple[Correction, ...] = ()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All of them, in the order in which they act."""
        return (*self.transforms, self.grid, self.rounding, *self.corrections)

    @property
    def of_layer(self) -> tuple[Choice, ...]:
        """Those that see nothing but the layer."""
        return tuple(choice for choice in self.choices if scope_of(choice) == "layer")

    @property
    def layer_transforms(self) -> tuple[Transform, ...]:
        return tuple(transform for transform in self.transforms if scope_of(transform) == "layer")

    @property
    def layer_corrections(self) -> tuple[Correction, ...]:
        return tuple(correction for correction in self.corrections if scope_of(correction) == "layer")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that any of the choices declares, in alphabetical order; empty: data-free."""
        return tuple(sorted({name for choice in self.choices for name in choice.needs}))

    @property
    def calibrated(self) -> bool:
        """Whether the network must be run for it."""
        return bool(self.needs) or any(scope_of(choice) != "layer" for choice in self.choices)

    @property
    def by_itself(self) -> bool:
        """Whether the first code of a layer follows from its weight alone; choices that see the whole model may come
        later."""
        near = [choice for choice in self.choices if scope_of(choice) != "model"]
        return not any(choice.needs or scope_of(choice) == "block" for choice in near)

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes stored for a matrix beside the codes of its grid, as far as they can be told without data."""
        return sum(choice.extra_bytes(shape) for choice in (*self.transforms, self.rounding, *self.corrections))

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Stored bytes of a matrix, from the layout of its code (scales that need float32 add to it)."""
        return self.extra_bytes(shape) + sum(t.nbytes for t in code_layout(self.grid.spec(shape)).values())

    def without_data(self) -> Treatment:
        """What a layer gets where it cannot be calibrated: the same with rounding to nearest. Itself, if data-free."""
        return replace(self, rounding=Nearest()) if self.calibrated else self

    def settings(self) -> dict[str, Any]:
        """All choices with their settings, JSON-able."""
        return {
            "transforms": [choice.settings() for choice in self.transforms],
            "grid": self.grid.settings(),
            "rounding": self.rounding.settings(),
            "corrections": [choice.settings() for choice in self.corrections],
        }


def check_order(transforms: tuple[Transform, ...], field: str = "transforms") -> None:
    """RecipeError where transforms stand in an order that cannot be stored."""
    if FIRST in [transform.kind for transform in transforms][1:]:
        raise RecipeError(f"the transform {FIRST} must be the first in {field}: put it before the others")
