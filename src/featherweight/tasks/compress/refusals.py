"""What a recipe, a model's structure and shapes alone say cannot be done: said before the work, not after hours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.session import TARGETS
from featherweight.methods.calibrate.statistics import known_statistics, statistic_named
from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.methods.quantize.base import Choice, Correction, Rounding, Transform
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.methods.recipe import Recipe
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.anatomy.family import find_family
from featherweight.storage.checkpoint.checkpoint import Checkpoint


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for choices that do not go together, or ask for what nobody gathers."""
    for name in recipe.needs:
        if name != TARGETS:
            try:
                statistic_named(name)
            except ValueError as error:
                raise RecipeError(f"recipe {recipe.name} needs the statistic {name!r}: {error}") from None
    weighed = {
        n for n in recipe.needs if n != TARGETS and statistic_named(n).gathered and "in" in statistic_named(n).axes
    }
    if recipe.calibration.guidance and not weighed:
        what = "makes the codes of a whole model" if recipe.calibrated else "needs no text"
        raise RecipeError(
            f"recipe {recipe.name} has calibration.guidance {recipe.calibration.guidance}, but {what} and gathers no "
            "statistics that gradients could weigh: set it to 0, or take a rounding like hessian"
        )
    _check_rounding(recipe, recipe.treatment)
    later = [c for c in recipe.corrections if scope_of(c) == "model"]
    before = [c for c in recipe.choices if c.alters]
    if later and before:
        raise RecipeError(
            f"recipe {recipe.name}: {_kinds(later)} compares with the original model, which no longer has the norms "
            f"and biases that {_kinds(before)} changes; leave one of them out"
        )


def _check_rounding(recipe: Recipe, treatment: Treatment, layer: str = "") -> None:
    """RecipeError where a rounding of blocks, or of the whole model, never comes to other choices."""
    of_layer = f" of {layer}" if layer else ""
    if treatment.grid.whole and treatment.rounding.kind != "nearest":
        raise RecipeError(
            f"recipe {recipe.name}: the grid {treatment.grid.kind}{of_layer} takes a matrix as a whole, with no values "
            f"that the rounding {treatment.rounding.kind} could choose from: set rounding to nearest"
        )
    left_out = _left_out(treatment)
    if left_out:
        raise RecipeError(
            f"recipe {recipe.name}: the rounding {treatment.rounding.kind} makes the codes of a whole "
            f"{treatment.rounding.scope}, to which {_kinds(left_out)}{of_layer} would not be applied; leave them out"
        )


def _left_out(treatment: Treatment) -> list[Choice]:
    rounds = treatment.rounding.scope
    if rounds == "layer":
        return []
    found: list[Choice] = [t for t in treatment.transforms if scope_of(t) in ("layer", "block")]
    for correction in treatment.corrections:
        between = type(correction).after_group is not Correction.after_group
        if scope_of(correction) == "layer" or (scope_of(correction) == "block" and (rounds == "model" or between)):
            found.append(correction)
    return found


def check_reads_text(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """RecipeError for a recipe that runs a network on text, and a family whose layers are convolutions."""
    family = find_family(checkpoint.config)
    if recipe.calibrated and family is not None and any(group.convolution for group in family.input_groups):
        raise _reads_no_text(recipe, family.name)


def _reads_no_text(recipe: Recipe, convolution: str) -> RecipeError:
    return RecipeError(
        f"recipe {recipe.name} is calibrated with text, which a model with convolutions ({convolution}) does not read: "
        "use a recipe without data, or featherweight.quantize with convolutions=True and batches of images"
    )


def check_ends(recipe: Recipe, anatomy: Anatomy, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """RecipeError for matrices outside the blocks that cannot be compressed. names : of the layers that are to be."""
    ends = [layer for layer in anatomy.outside if layer.name in names]
    if ends and checkpoint.config.get("is_encoder_decoder") is True:
        raise RecipeError(
            f"recipe {recipe.name} compresses {ends[0].name}, which encoder and decoder of this model share: set "
            "embedding and head to keep"
        )


def check_layers(
    recipe: Recipe, anatomy: Anatomy, layers: Iterable[tuple[str, Sequence[Treatment]]], text: bool = True
) -> None:
    """RecipeError for a model that a choice cannot treat, or a layer whose choices do not go together.

    layers : names, and all treatments that the layer may get
    text : whether it is calibrated with that
    """
    layers = list(layers)
    convolutions = {layer.name for layer in anatomy.layers if layer.kernel}
    if convolutions and recipe.calibrated and text:
        raise _reads_no_text(recipe, next(layer.name for layer in anatomy.layers if layer.kernel))
    for name, treatments in layers if convolutions else ():
        if name in convolutions and any(t.kind == "quantize-inputs" for one in treatments for t in one.transforms):
            raise RecipeError(
                f"recipe {recipe.name} rounds inputs, which the convolution {name} cannot: leave out quantize-inputs"
            )
    for transform in _distinct(t for _, treatments in layers for treatment in treatments for t in treatment.transforms):
        reason = transform.refusal(anatomy)
        if reason is not None:
            raise RecipeError(f"recipe {recipe.name}: transform {transform.kind} {reason}")
        tied = anatomy.embedding if anatomy.tied_head is not None else None
        if tied is not None and scope_of(transform) == "model" and any(name == tied.name for name, _ in layers):
            raise RecipeError(
                f"recipe {recipe.name}: transform {transform.kind} makes two matrices of {tied.name}, which is "
                "embedding and output layer of this model, so it cannot be compressed as one: set embedding "
                "and head to keep"
            )
    known = {layer.name: layer for layer in (*anatomy.layers, *anatomy.outside)}
    for name, treatments in layers:
        for treatment in treatments:
            _check_rounding(recipe, treatment, name)
            for one in treatment.layer_transforms if name in known else ():
                reason = one.layer_refusal(known[name].shape[1], known[name].role)
                if reason is not None:
                    raise RecipeError(f"recipe {recipe.name}: transform {one.kind} cannot treat {name}: {reason}")
            _check_grid(recipe, treatment, name)
            if recipe.rounding.scope == "model" and treatment.rounding.scope == "layer" and treatment.needs:
                needing = [choice for choice in treatment.choices if choice.needs]
                raise RecipeError(
                    f"recipe {recipe.name}: the rounding {recipe.rounding.kind} treats the whole model at once, so no "
                    f"statistics of single layers are gathered, which {_kinds(needing)} of {name} needs; give that "
                    "layer choices that need no data"
                )


def _check_grid(recipe: Recipe, treatment: Treatment, layer: str) -> None:
    """RecipeError for a rounding or correction that cannot be used with a layer's grid."""
    asked: list[tuple[str, Rounding | Correction]] = [("rounding", treatment.rounding)]
    for axis, choice in [*asked, *(("correction", correction) for correction in treatment.corrections)]:
        reason = choice.refusal(treatment.grid)
        if reason is not None:
            verb = "round" if axis == "rounding" else "treat"
            raise RecipeError(
                f"recipe {recipe.name}: {axis} {choice.kind} cannot {verb} {layer}, whose grid is "
                f"{treatment.grid.kind}: {reason}"
            )


def _distinct(transforms: Iterable[Transform]) -> list[Transform]:
    """Each object once, in their order."""
    return list({id(transform): transform for transform in transforms}.values())


def check_base(layers: Iterable[LinearLayer], checkpoint: Checkpoint, base: Checkpoint) -> None:
    """RecipeError for a base model that lacks a layer or has it in another shape."""
    for layer in layers:
        tensor, wanted = layer.tensor, checkpoint.entry(layer.tensor).shape
        found = base.entry(tensor).shape if tensor in base.names else None
        if found != wanted:
            what = "lacks" if found is None else f"has {list(found)} for"
            raise RecipeError(
                f"the base model {base.folder} {what} {tensor} {list(wanted)} of the model that is compressed: name "
                "the one that this model was fine-tuned from"
            )


def check_stored(recipe: Recipe, path: Path, checkpoint: Checkpoint) -> None:
    """RecipeError where a recipe needs more than a file of statistics holds."""
    wide = [choice.kind for choice in recipe.choices if scope_of(choice) != "layer"]
    if wide:
        raise RecipeError(f"recipe {recipe.name} runs the network ({', '.join(wide)}): give it a text, not {path.name}")
    with StatisticsFile.open(path, checkpoint) as file:
        held, wanted = int(file.settings.get("guidance", 0)), recipe.calibration.guidance
        if held != wanted:
            raise RecipeError(
                f"{path} was gathered with calibration.guidance {held}, recipe {recipe.name} has {wanted}: gather it "
                f"again with `feather calibrate --set calibration.guidance={wanted}`, or set it to {held}"
            )
        lacking = [name for name in recipe.needs if name not in file.names]
        if lacking:
            known = known_statistics()
            never = [name for name in lacking if name in known and not known[name].stored]
            remedy = "no file can hold that" if never else "gather it with `feather calibrate`"
            raise RecipeError(
                f"{path} does not hold {', '.join(never or lacking)}, which recipe {recipe.name} needs (it holds "
                f"{', '.join(file.names)}): {remedy}{';' if never else ', or'} give a text"
            )


def _kinds(choices: Iterable[Any]) -> str:
    return " and ".join(choice.kind for choice in choices)
