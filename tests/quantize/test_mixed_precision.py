"""Mixed precision against brute force, and every way to ask for what cannot be given."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from featherweight.errors import RecipeError
from featherweight.methods.budget.base import Candidate, LayerCandidates
from featherweight.methods.budget.fixed import Fixed
from featherweight.methods.budget.mixed_precision import MixedPrecision, lower_hull
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.quantize.treatment import Treatment
from featherweight.methods.recipe import recipe_from
from featherweight.storage.codes import code_layout

Layers = dict[str, LayerCandidates]


def treatment(bits: int) -> Treatment:
    return Treatment(UniformGrid(bits=bits), Nearest())


def layer(shape: tuple[int, int], *candidates: tuple[int, float]) -> LayerCandidates:
    """Candidates of (bytes, error), told apart by their bits."""
    return LayerCandidates(
        shape, tuple(Candidate(treatment(bits), *found) for bits, found in enumerate(candidates, start=2))
    )


def taken(layers: Layers, chosen: dict[str, Treatment]) -> tuple[int, float]:
    """Bytes and weighted error of a choice."""
    found = [next(c for c in one.candidates if c.treatment is chosen[name]) for name, one in layers.items()]
    sizes = [one.shape[0] * one.shape[1] for one in layers.values()]
    return sum(c.nbytes for c in found), sum(n * (c.error or 0.0) for n, c in zip(sizes, found, strict=True))


def best(layers: Layers, most: int) -> float:
    """The least weighted error of all choices that keep to so many bytes, by trying all."""
    sizes = [one.shape[0] * one.shape[1] for one in layers.values()]
    choices = itertools.product(*(one.candidates for one in layers.values()))
    fitting = [c for c in choices if sum(one.nbytes for one in c) <= most]
    return min(sum(n * (c.error or 0.0) for n, c in zip(sizes, one, strict=True)) for one in fitting)


def random_layers(seed: int) -> Layers:
    """Errors that fall with bytes, not always by less and less."""
    chance = random.Random(seed)
    layers = {}
    for number in range(chance.randint(2, 5)):
        rows, columns = chance.choice([(8, 8), (8, 16), (16, 32)])
        nbytes = sorted(chance.sample(range(rows * columns // 8, rows * columns), 4))
        errors = sorted((chance.random() for _ in range(4)), reverse=True)
        layers[f"layer {number}"] = layer((rows, columns), *zip(nbytes, errors, strict=True))
    return layers


def bits_of(layers: Layers, nbytes: int) -> float:
    return 8 * nbytes / sum(one.weights for one in layers.values())


@pytest.mark.parametrize("seed", range(60))
def test_choices_keep_to_the_budget_and_are_near_the_best(seed: int) -> None:
    """Nearer than the largest step along a hull saves; and the best, for just the bytes of a step of the greedy way."""
    layers = random_layers(seed)
    least = sum(min(c.nbytes for c in one.candidates) for one in layers.values())
    most = sum(max(c.nbytes for c in one.candidates) for one in layers.values())
    steps = [
        one.weights * ((a.error or 0) - (b.error or 0))
        for one in layers.values()
        for a, b in itertools.pairwise(lower_hull(one.candidates))
    ]
    for budget in range(least, most + 20, max(1, (most - least) // 12)):
        allocator = MixedPrecision(bits=bits_of(layers, budget) + 1e-9)
        nbytes, error = taken(layers, allocator.assign(layers))
        assert nbytes <= budget
        optimum = best(layers, budget)
        assert optimum - 1e-12 <= error < optimum + max(steps)
    for ratio in {-s / 7 for s in steps}:  # any price of a byte: what is best by it is the best for its bytes
        chosen = {
            name: min(one.candidates, key=lambda c, n=one.weights: n * (c.error or 0) - ratio * c.nbytes).treatment  # type: ignore[misc]
            for name, one in layers.items()
        }
        nbytes, error = taken(layers, chosen)
        found = taken(layers, MixedPrecision(bits=bits_of(layers, nbytes) + 1e-9).assign(layers))
        assert found[1] == pytest.approx(best(layers, nbytes), abs=1e-12) == pytest.approx(error, abs=1e-12)


def test_more_bits_never_miss_more() -> None:
    layers = random_layers(7)
    least = sum(min(c.nbytes for c in one.candidates) for one in layers.values())
    errors = [
        taken(layers, MixedPrecision(bits=bits_of(layers, least + more) + 1e-9).assign(layers))[1]
        for more in range(0, 600, 25)
    ]
    assert errors[0] > errors[-1]
    assert max(b - a for a, b in itertools.pairwise(errors)) < 0.2 * errors[0]  # greedy may waver, by little


def test_the_hull_leaves_out_what_never_pays() -> None:
    found = lower_hull(layer((8, 8), (10, 0.9), (20, 0.8), (30, 0.2), (40, 0.3), (50, 0.1)).candidates)
    assert [(c.nbytes, c.error) for c in found] == [(10, 0.9), (30, 0.2), (50, 0.1)]
    equal = lower_hull(layer((8, 8), (10, 0.9), (10, 0.5), (20, 0.5)).candidates)
    assert [(c.nbytes, c.error) for c in equal] == [(10, 0.5)]
    on_a_line = lower_hull(layer((8, 8), (10, 3.0), (20, 2.0), (30, 1.0)).candidates)
    assert [c.nbytes for c in on_a_line] == [10, 20, 30]  # smaller steps leave less of a budget unused


def test_a_large_layer_counts_by_its_weights() -> None:
    """Ten times the weights for ten times the bytes: a little more error saved then counts for more a byte."""
    layers = {"small": layer((8, 8), (10, 0.4), (20, 0.3)), "large": layer((8, 80), (100, 0.4), (200, 0.29))}
    chosen = MixedPrecision(bits=bits_of(layers, 210)).assign(layers)
    assert chosen["large"].grid.settings()["bits"] == 3
    assert chosen["small"].grid.settings()["bits"] == 2


def test_a_budget_that_cannot_be_met_is_named_with_what_can() -> None:
    layers = random_layers(3)
    least = sum(min(c.nbytes for c in one.candidates) for one in layers.values())
    stated = f"{bits_of(layers, least):.4f}"
    with pytest.raises(RecipeError, match=f"allocation.bits is 0.1, but .* {stated} bits a weight") as caught:
        MixedPrecision(bits=0.1).assign(layers)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has none"):
        MixedPrecision(bits=8.0).assign({"one": LayerCandidates((8, 8), (Candidate(treatment(2), 10),))})


def test_bounds_hold_without_errors() -> None:
    layers = random_layers(5)
    most = sum(max(c.nbytes for c in one.candidates) for one in layers.values())
    assert Fixed().most_bytes(layers) == MixedPrecision(bits=99.0).most_bytes(layers) == most
    weights = sum(one.weights for one in layers.values())
    budget = bits_of(layers, most - 40)
    assert MixedPrecision(bits=budget).most_bytes(layers) == math.floor(budget * weights / 8)
    assert Fixed().assign(layers) == {name: one.candidates[0].treatment for name, one in layers.items()}


def test_candidates_change_the_recipes_grid() -> None:
    allocator = MixedPrecision(grids=({"bits": 2}, {"bits": 5, "group_size": 64}, {"kind": "trit-planes"}))
    own = Treatment(UniformGrid(bits=4, group_size=32, symmetric=True), Nearest())
    two, five, trits = (found.grid.settings() for found in allocator.treatments(own))
    assert (two["bits"], two["group_size"], two["symmetric"]) == (2, 32, True)
    assert (five["bits"], five["group_size"], five["symmetric"]) == (5, 64, True)
    assert trits["kind"] == "trit-planes"
    shape = (40, 256)
    for found in allocator.treatments(own):
        assert found.nbytes(shape) == sum(t.nbytes for t in code_layout(found.grid.spec(shape)).values())


@pytest.mark.parametrize(
    ("allocation", "words"),
    [
        ({"grids": [{"bitts": 3}]}, r"no field allocation.grids\[0\].bitts \(did you mean 'bits'"),
        ({"grids": [{"bits": 2}, {"kind": "unifrm"}]}, "no grid called 'unifrm'"),
        ({"grids": []}, "allocation.grids is .*name at least one grid"),
        ({"bits": 0}, "allocation.bits is 0"),
        ({"errors": "inputs"}, "allocation.errors is 'inputs'"),
    ],
)
def test_wrong_settings_are_said_where_the_recipe_is_read(allocation: dict[str, object], words: str) -> None:
    mapping = {"name": "mine", "grid": {"kind": "uniform"}, "allocation": {"kind": "mixed-precision", **allocation}}
    with pytest.raises(RecipeError, match=f"recipe mine: .*{words}"):
        recipe_from(mapping, "mine")
