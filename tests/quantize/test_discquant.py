"""DiscQuant (arXiv 2501.06417): neighbours, the pull to the nearer end, distillation; the vertex theorem on a toy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import tiny_session
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.learn.objectives import ModelObjective
from featherweight.methods.quantize.base import Grid, SolveOptions
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.discquant import DiscQuant, Neighbours

GRIDS: list[Grid] = [
    UniformGrid(bits=3, group_size=32),
    UniformGrid(bits=2, group_size=32, symmetric=True, clip="mse"),
    TritPlaneGrid(planes=2, group_size=32),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbours(grid: Grid) -> None:
    weight = random(12, 80)
    layer = Neighbours(weight, grid, "w")
    free = layer.free
    assert torch.allclose(layer.value(layer.share)[free], weight[free], atol=1e-6)
    assert bool((layer.share[~free] == 0.5).all())
    assert float(free.float().mean()) > 0.8
    levels = grid.levels(layer.fit)
    place = torch.arange(80) // 32
    for x, add in ((torch.zeros(12, 80), 0), (torch.ones(12, 80), 1)):
        decoded = layer.code(x).decode()
        assert torch.allclose(decoded[free], layer.value(x)[free], atol=1e-6)
        index = layer.index.long() + add * free
        expected = levels[torch.arange(12).unsqueeze(1), place, index]
        assert torch.allclose(decoded, expected, atol=1e-6)
    assert torch.allclose(layer.code(layer.share).decode(), grid.quantize(weight).decode(), atol=1e-6)
    outside = ~free
    assert torch.allclose(layer.code(torch.ones(12, 80)).decode()[outside], layer.code(layer.share).decode()[outside])


@pytest.mark.parametrize("start", ["weight", "random"])
@pytest.mark.parametrize("grid", GRIDS)
def test_without_divergence_it_is_round_to_nearest(grid: Grid, start: Any, tmp_path: Path) -> None:
    model = tiny_session(tmp_path)
    names = [name for name in model.layers if name.endswith("v_proj")]
    told: list[dict[str, Any]] = []
    rounding = DiscQuant(rho=0, steps=150, start=start, learning_rate=0.1)
    codes = rounding.quantize_model(model, dict.fromkeys(names, grid), SolveOptions(), told.append)
    for name in names:
        expected = grid.quantize(model.weight(name)).decode()
        tie = (Neighbours(model.weight(name), grid, name).share - 0.5).abs() < 1e-4
        assert torch.allclose(codes[name].decode()[~tie], expected[~tie], atol=1e-6)
    assert told[-1]["fractional"] < 0.02


def test_distillation_lowers_the_divergence(tmp_path: Path) -> None:
    model = tiny_session(tmp_path, windows=64, held_out=8, length=32, initializer_range=0.1)
    grid = UniformGrid(bits=2, group_size=32, clip="mse")
    grids = {name: grid for name in model.layers if name != "lm_head"}
    told: list[dict[str, Any]] = []
    rounding = DiscQuant(steps=60, batch_size=8, learning_rate=0.05, kappa=1.0)
    codes = rounding.quantize_model(model, grids, SolveOptions(), told.append)
    objective = ModelObjective(model)
    nearest = {name: grid.quantize(model.weight(name)) for name in codes}
    found, without = (
        objective.held_out_loss({name: code.decode() for name, code in chosen.items()}, {})
        for chosen in (codes, nearest)
    )
    assert found is not None
    assert without is not None
    assert found < 0.9 * without
    for name, code in codes.items():
        decoded = code.decode()
        assert code.spec == grid.quantize(model.weight(name)).spec
        assert all(len(group.unique()) <= 4 for row in decoded for group in row.split(32))


def test_a_grid_without_levels_is_refused(tmp_path: Path) -> None:
    model = tiny_session(tmp_path)
    with pytest.raises(RecipeError, match="cannot round"):
        DiscQuant(steps=1).quantize_model(model, {next(iter(model.layers)): DenseGrid()}, SolveOptions())


def rounded_by_walking(constraints: Tensor, y: Tensor, steps: int) -> Tensor:
    """The relaxation of the card: least squares of M (x - y), a pull to the nearer ends, a box."""
    x = y.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.02)
    for _ in range(steps):
        divergence = constraints.T @ (constraints @ (x.detach() - y))
        x.grad = (1 - 2 * y) + (20 * divergence).clamp(-2, 2)
        optimiser.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def test_few_coordinates_stay_fractional_and_constraints_hold() -> None:
    """Card, items 3 and 4: 12 constraints on 200 weights; and an 8-dimensional space of gradients that generalises."""
    y = torch.rand(200, generator=torch.Generator().manual_seed(0))
    constraints = random(12, 200, seed=1)
    x = rounded_by_walking(constraints, y, 3000)
    assert int(((x > 0.02) & (x < 0.98)).sum()) <= 24
    missed, nearest = ((constraints @ (v.round() - y)).norm() for v in (x, y))
    assert missed < 0.6 * nearest
    space = random(8, 200, seed=2)
    seen, unseen = random(40, 8, seed=3) @ space / 8**0.5, random(500, 8, seed=4) @ space / 8**0.5
    x = rounded_by_walking(seen / 3, y, 3000)
    assert (unseen @ (x.round() - y)).square().mean() < 0.25 * (unseen @ (y.round() - y)).square().mean()


def test_the_linear_term_is_the_squared_distance() -> None:
    """Card, item 5: on vertices the linear term differs from ||x - y||^2 by a constant."""
    y = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    vertices = torch.randint(0, 2, (20, 50), generator=torch.Generator().manual_seed(1)).double()
    difference = (vertices - y).square().sum(1) - vertices @ (1 - 2 * y)
    assert torch.allclose(difference, y.square().sum().expand(20))
