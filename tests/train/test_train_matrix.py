"""Every forward code x backward rule x side path x activation: what goes together trains and is stored exactly, what
does not is refused by name. Whatever else is registered is tried as well."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from featherweight.errors import FeatherError, RecipeError
from featherweight.methods.train.flips import Flips
from featherweight.methods.train.prepare import (
    check_exportable,
    low_bit_layers,
    make_optimiser,
    penalty,
    prepare,
    set_clock,
    set_rates,
)
from featherweight.methods.train.recipe import train_presets, train_recipe
from featherweight.model.layers.activations import quantized_inputs
from featherweight.registry import registered

AXES = ("forward", "backward", "side", "activation")
POINTS = list(itertools.product(*(registered(axis) for axis in AXES)))
ZEROS, EDGES = (
    ("absmean", "twn", "elastic", "uniform", "sherry"),
    ("absmean", "twn", "elastic", "uniform", "statsq", "binary"),
)


def refused(forward: str, backward: str, side: str, activation: str) -> str | None:
    """By the papers: which choice is named where these do not go together; None where they do."""
    if forward == "full":
        return "full" if (backward, side, activation) != ("identity", "none", "none") else None
    if (backward == "lsq") != (forward == "elastic"):
        if backward == "dead-zone" and forward not in ZEROS:
            return "dead-zone"
        return "lsq"
    if backward == "dead-zone" and forward not in ZEROS:
        return "dead-zone"
    if backward == "cga" and forward not in EDGES:
        return "cga"
    if side == "tequila" and (forward not in ZEROS or backward == "dead-zone"):
        return "tequila"
    return None


def recipe_of(point: tuple[str, ...]) -> dict[str, Any]:
    return {axis: {"kind": kind} for axis, kind in zip(AXES, point, strict=True)}


def test_most_of_the_space_makes_sense() -> None:
    good = [point for point in POINTS if refused(*point) is None]
    assert len(good) >= 150
    assert {point[0] for point in good} == set(registered("forward"))
    for place, axis in enumerate(AXES):
        assert {point[place] for point in good} == set(registered(axis)), axis


@pytest.mark.parametrize("forward", registered("forward"))
def test_points_of_a_forward_code(forward: str) -> None:
    for point in (point for point in POINTS if point[0] == forward):
        named = refused(*point)
        if named is None:
            train_and_store(point)
        else:
            with pytest.raises(RecipeError, match=named):
                train_recipe(recipe_of(point))


def train_and_store(point: tuple[str, ...]) -> None:
    """Three steps lower the loss's parameters are changed by, and the stored layer multiplies as the trained one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Tanh(), nn.Linear(16, 8)).double()
    recipe = train_recipe(recipe_of(point) | {"schedule": {"kind": "linear", "learning_rate": 0.01, "warmup": 0.0}})
    prepare(model, recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser, flips = make_optimiser(model, recipe), Flips(model)
    inputs = torch.randn(10, 32, dtype=torch.float64)
    for step in range(3):
        set_clock(model, step, 3)
        set_rates(optimiser, recipe, step, 3)
        loss, extra = model(inputs).square().sum(), penalty(model)
        (loss if extra is None else loss + extra).backward()
        optimiser.step()
        optimiser.zero_grad()
    set_clock(model, 3, 3)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in still if not name.endswith("side_gate")] == [], point
    assert flips.counted().weights == (0 if point[0] == "full" else 32 * 16 + 16 * 8)
    model.eval()
    if recipe.activation.unstorable:
        with pytest.raises(RecipeError, match=f"activation {point[3]} .* no folder can hold"):
            check_exportable(recipe)
        return
    tolerance = {"integers": 1e-6, "none": 1e-12}[point[3]] if point[2] != "hgf" else 1e-5  # integers, sums: float32
    for layer in low_bit_layers(model).values():
        inputs = torch.randn(10, layer.in_features, dtype=torch.float64)
        matrix, bias = layer.code().decode().double(), layer.stored_bias()
        rounding = layer.code().input_rounding(layer.code().spec)
        seen = inputs if rounding is None else quantized_inputs(inputs, *rounding).double()
        stored = seen @ matrix.T + (0 if bias is None else bias)
        assert torch.allclose(stored, layer(inputs), rtol=0, atol=tolerance * float(stored.abs().max())), point


def test_presets_are_points_of_it() -> None:
    found = {name: train_recipe(name) for name in train_presets()}
    assert {"bitnet-b158", "trilm", "tequila", "sherry-train", "hgf", "ofq-weights", "tbt-weights", "full"} <= set(
        found
    )
    for name, recipe in found.items():
        if name in ("ofq", "tbt"):
            with pytest.raises(RecipeError, match=r"attention.inputs .* no folder can hold"):
                check_exportable(recipe)
            assert recipe.notes.startswith("No folder can hold it.")
        else:
            check_exportable(recipe)
        assert train_recipe(recipe.dump()) == recipe
        assert recipe.title, name
        assert recipe.notes, name


def test_wrong_recipes_are_named() -> None:
    for mapping, words in (
        ({"forward": {"kind": "absmaen"}}, "did you mean 'absmean'"),
        ({"forward": {"kind": "absmean", "scoop": "row"}}, "forward.scoop"),
        ({"forward": {"kind": "statsq", "bits": 0}}, "bits"),
        ({"forward": {"kind": "twn"}, "sides": {}}, "sides"),
        ({}, "forward is missing"),
        ({"forward": {"kind": "twn"}, "layers": {"skp": 1}}, "skp"),
    ):
        with pytest.raises(RecipeError, match=words):
            train_recipe(mapping)
    with pytest.raises(RecipeError, match=r"did you mean 'trilm'.*presets: bitnet-b158"):
        train_recipe("trlm")


def test_what_cannot_be_trained_is_refused_and_nothing_changes() -> None:
    with pytest.raises(FeatherError, match="no linear layers"):
        prepare(nn.Sequential(nn.Conv1d(1, 1, 1)), "trilm")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 8))
    with pytest.raises(RecipeError, match=r"1 has 6 columns .* layers.skip"):
        prepare(model, "sherry-train")
    assert type(model[0]) is nn.Linear
    with pytest.raises(FeatherError, match="leave no layer of Sequential"):
        prepare(model, "trilm", ["layers.skip=['*']"])
    prepare(model, "trilm", ["layers.skip='1'"])
    assert list(low_bit_layers(model)) == ["0"]
    prepare(model, "trilm")
    assert list(low_bit_layers(model)) == ["0", "1"]
    with pytest.raises(FeatherError, match="low-bit layers already"):
        prepare(model, "trilm")


def test_latents_have_float32_and_inputs_what_they_have() -> None:
    model = prepare(nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16), "trilm")
    assert model[0].weight.dtype == torch.float32
    assert model(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.ones(2, 16)).dtype == torch.bfloat16
