"""The two matrices outside the blocks in a recipe: token embedding and output layer.

    embedding: {grid: {kind: uniform, bits: 6, group_size: 64}}   # and rounding: {kind: nearest}, unless it is named
    embedding: 6bit                                               # short for uniform, bits: 6, group_size: 128
    head: same                                                    # as the layers of the blocks
    head: keep                                                    # as it is, the default

A model that ties its output layer to the embedding has one matrix for both. It is compressed once, stays tied, and gets
what either field asks for; two fields that ask for different things are an error, except that the head's rounding
counts where they differ in nothing else: its products are what errors matter to, an embedding's rows are looked up.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featherweight.errors import RecipeError, shown
from featherweight.methods.quantize.base import Choice, Grid
from featherweight.methods.quantize.choosing import choice_on, explain, with_settings
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer

FIELDS = ("embedding", "head")
BITS = re.compile(r"([2-8])[ -]?bits?")


class EndChoices(BaseModel):
    """Choices of an embedding's or output layer's own. A grid without a `kind` changes settings of the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    grid: dict[str, Any] = Field(description="a grid, or settings of the recipe's own")
    rounding: dict[str, Any] | None = Field(None, description="a rounding of layers; else to nearest")


End = Literal["keep", "same"] | EndChoices


def read_end(value: Any, field: str) -> Any:
    """What a recipe's field stands for. RecipeError naming the field where it says nothing that is known."""
    if isinstance(value, EndChoices) or value in ("keep", "same"):
        return value
    bits = BITS.fullmatch(value) if isinstance(value, str) else None
    if bits is not None:
        value = {"grid": {"kind": "uniform", "bits": int(bits[1]), "group_size": 128}}
    if not isinstance(value, dict):
        raise RecipeError(
            f"field {field} is {shown(value)}, but must be keep, same, 6bit (or from 2 to 8 of them), or a mapping "
            "with a grid, like {grid: {kind: uniform, bits: 6}}"
        )
    try:
        return EndChoices(**value)
    except ValidationError as error:
        raise RecipeError(explain(error, EndChoices, f"{field}.")) from None


def end_treatment(end: End, field: str, whole: Treatment) -> Treatment | None:
    """What a matrix outside the blocks gets, None where it is kept.

    Choices of its own come without the recipe's transforms and corrections, but for those that see the whole model.

    Parameters
    ----------
    whole : the treatment of the recipe's other layers
    """
    if end == "keep":
        return None
    if end == "same":
        return whole
    assert isinstance(end, EndChoices)
    grid: Grid = with_settings("grid", whole.grid, end.grid, f"{field}.grid")
    rounding = choice_on("rounding", end.rounding or {"kind": "nearest"}, f"{field}.rounding")
    if scope_of(rounding) != "layer":
        raise RecipeError(
            f"field {field}.rounding: {rounding.kind} chooses the codes of a whole {scope_of(rounding)} together, "
            "which a matrix outside the blocks cannot have; take a rounding of layers such as {kind: nearest}"
        )
    return Treatment(grid, rounding, _of_model(whole.transforms), _of_model(whole.corrections))


def _of_model(choices: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(choice for choice in choices if scope_of(choice) == "model")


def own_choices(end: End, field: str, whole: Treatment) -> tuple[Choice, ...]:
    """What a field adds to the recipe's choices."""
    treatment = end_treatment(end, field, whole)
    return () if treatment is None or treatment is whole else (treatment.grid, treatment.rounding)


def _but_rounding(end: End) -> Any:
    """What a field asks for, leaving aside how it rounds."""
    return end.grid if isinstance(end, EndChoices) else end


def ends_of(anatomy: Anatomy, ends: dict[str, End], recipe: str) -> list[tuple[LinearLayer, str]]:
    """The matrices outside the blocks that are compressed, each with the field that says how.

    Parameters
    ----------
    ends : by field, `embedding` and `head`

    Raises
    ------
    RecipeError
        The model has no such matrix, or one matrix for both fields, which want different things.
    """
    asked = {field: end for field, end in ends.items() if end != "keep"}
    if "embedding" in asked and anatomy.embedding is None:
        raise RecipeError(
            f"recipe {recipe} compresses the token embedding, which this model has not (or not as a matrix of "
            "floating-point numbers): set embedding to keep"
        )
    if anatomy.tied_head is not None:
        assert anatomy.embedding is not None
        if len(asked) > 1 and _but_rounding(asked["embedding"]) == _but_rounding(asked["head"]):
            return [(anatomy.embedding, "head")]
        if len(asked) > 1:
            raise RecipeError(
                f"recipe {recipe} asks for different things in embedding and head, but this model has one matrix for "
                "both (tie_word_embeddings): set one of them to keep, and the other counts for both"
            )
        return [(anatomy.embedding, next(iter(asked)))] if asked else []
    found = [(anatomy.embedding, "embedding"), (anatomy.head, "head")]
    return [(layer, field) for layer, field in found if layer is not None and field in asked]
