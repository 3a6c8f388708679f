"""The knapsack as an allocation: exact against brute force, bytes kept to, the cap."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from featherweight.errors import RecipeError
from featherweight.methods.budget.base import Candidate, LayerCandidates
from featherweight.methods.budget.removed import Knapsack
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.grids.factors import FactorsGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.quantize.treatment import Treatment

BASE = Treatment(FactorsGrid(), Nearest())
SHAPES = {"a": (10, 10), "b": (20, 10), "c": (10, 40), "d": (30, 30)}


def layers(seed: int, errors: bool = True) -> dict[str, LayerCandidates]:
    """Four layers of four sizes each; the last is the layer as it is."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        weights = shape[0] * shape[1]
        misses = torch.rand(3, generator=generator).sort(descending=True).values.tolist()
        sizes = [int(2 * weights * share) for share in (0.31, 0.52, 0.77)]
        treatments = [Treatment(FactorsGrid(removed=0.5 + place / 100), Nearest()) for place in range(3)]
        options = [Candidate(t, size, miss**2) for t, size, miss in zip(treatments, sizes, misses, strict=True)]
        options.append(Candidate(Treatment(DenseGrid(), Nearest()), 2 * weights, 0.0))
        found[name] = LayerCandidates(shape, tuple(options))
    return found


def spent(found: dict[str, LayerCandidates], chosen: dict[str, Treatment]) -> tuple[int, float]:
    """Bytes and summed error of a choice."""
    taken = [next(c for c in found[name].candidates if c.treatment is chosen[name]) for name in found]
    return sum(c.nbytes for c in taken), sum(math.sqrt(c.error or 0) for c in taken)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_misses_less(seed: int) -> None:
    found = layers(seed)
    before = 0.0
    for removed in (0.05, 0.2, 0.35, 0.5, 0.65):
        allocation = Knapsack(removed=removed, cap=False)
        nbytes, missed = spent(found, allocation.assign(found))
        budget = (1 - removed) * 2 * sum(layer.weights for layer in found.values())
        every = itertools.product(*(layer.candidates for layer in found.values()))
        best = min(
            sum(math.sqrt(c.error or 0) for c in choice) for choice in every if sum(c.nbytes for c in choice) <= budget
        )
        assert nbytes <= budget
        assert missed == pytest.approx(best)
        assert missed >= before  # a smaller budget never misses less
        before = missed


def test_a_share_that_cannot_be_removed_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match=r"allocation.removed is 0.8, but .* only 0.69\d\d of the bytes"):
        Knapsack(removed=0.8).assign(layers(0))


def test_no_layer_misses_far_more_than_the_mean_one() -> None:
    """One layer is cheap to lose in all, and would lose nearly everything."""
    shape = (10, 10)

    def layer(*pairs: tuple[int, float]) -> LayerCandidates:
        made = [Candidate(Treatment(FactorsGrid(), Nearest()), size, error**2) for size, error in pairs]
        return LayerCandidates(shape, tuple(made))

    steep = ((100, 0.9), (140, 0.6), (200, 0.0))
    found = {"lost": layer((10, 0.95), (140, 0.4), (200, 0.0)), "b": layer(*steep), "c": layer(*steep)}
    free = Knapsack(removed=0.3, cap=False).assign(found)
    capped = Knapsack(removed=0.3, cap=True).assign(found)
    assert spent({"lost": found["lost"]}, {"lost": free["lost"]})[0] == 10
    # mean at 0.3: (0.4 + 0.6 + 0.6) / 3 = 0.533; with alpha 1.2 a size of 140 is admitted everywhere
    assert [spent({name: found[name]}, {name: capped[name]})[0] for name in found] == [140, 140, 140]
    assert spent(found, capped)[1] > spent(found, free)[1]


def test_candidates_are_sizes_and_the_layer_itself() -> None:
    allocation = Knapsack(shares=(0.2, 0.4), kappas=(1, 2))
    grids = [one.grid for one in allocation.treatments(BASE)]
    assert [(g.removed, g.kappa) for g in grids[:-1] if isinstance(g, FactorsGrid)] == [
        (0.2, 1), (0.2, 2), (0.4, 1), (0.4, 2),
    ]  # fmt: skip
    assert grids[-1] == DenseGrid()
    assert len(Knapsack(shares=(0.2,), kappas=(1,), untouched=False).treatments(BASE)) == 1
    uniform = Treatment(UniformGrid(), Nearest())
    bits = Knapsack(grids=({"bits": 2}, {"bits": 4}), untouched=False).treatments(uniform)
    assert [one.grid.bits for one in bits if isinstance(one.grid, UniformGrid)] == [2, 4]
    with pytest.raises(
        RecipeError, match=r"does not know the sizes of the grid uniform: name them in allocation.grids"
    ):
        Knapsack().treatments(uniform)
    with pytest.raises(RecipeError, match="kappa"):
        Knapsack(kappas=(0.5,)).treatments(BASE)
