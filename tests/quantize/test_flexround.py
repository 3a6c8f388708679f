"""FlexRound (arXiv 2306.00317): the card's checks of start, gradients, reach and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, tiny_model
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.learn.objectives import BlockObjective
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.flexround import DividedWeight, FlexRound

GRIDS = [
    UniformGrid(bits=3, group_size=1 << 20, clip="mse"),
    UniformGrid(bits=3, group_size=16),
    UniformGrid(bits=2, group_size=24, symmetric=True),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_start_is_round_to_nearest(grid: UniformGrid) -> None:
    weight = random(9, 40)
    weight[:, 3] = 0
    code, expected = DividedWeight(weight, grid, {}).code(), grid.quantize(weight)
    assert code.spec == expected.spec
    assert all(torch.equal(code.tensors()[name], tensor) for name, tensor in expected.tensors().items())


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_are_autograd_s(grid: UniformGrid) -> None:
    weight, direction = random(9, 40), random(9, 40, seed=1)
    layer = DividedWeight(weight, grid, {})
    layer.by_group += 0.1 * random(*layer.by_group.shape, seed=2)
    layer.by_weight += 0.2 * random(9, 40, seed=3)
    layer.by_row += 0.1 * random(9, 1, seed=4)
    layer.backward(direction)
    d1, d2, d3 = (p.clone().requires_grad_() for p in layer.parameters(True))
    size = min(grid.group_size, 40)

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(size, 1)[:, :40]

    zero = spread(layer.fit["zero_points"].float())
    divided = weight / spread(layer.start) * torch.exp(-(spread(d1) + d2 + d3))
    straight = divided + (divided.round() - divided).detach()
    clamped = torch.minimum(torch.maximum(straight, -zero), 2**grid.bits - 1 - zero)
    inside = (straight >= -zero) & (straight <= 2**grid.bits - 1 - zero)
    clamped = torch.where(inside, straight, clamped.detach())
    value = clamped * spread(layer.start * d1.exp())
    assert torch.allclose(value, layer.decode())
    assert grid.bits > 2 or not bool(inside.all())  # some are clipped
    (value * direction).sum().backward()
    for mine, theirs in zip(layer.parameters(True), (d1, d2, d3), strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert bool((layer.by_weight.grad[~inside] == 0).all())


def test_reach_and_zero() -> None:
    """A weight reaches a code three steps away; a weight of zero never moves."""
    weight = torch.tensor([[0.9, -1.0, 2.0, 0.0]])
    layer = DividedWeight(weight, UniformGrid(bits=4, group_size=4), {})
    step = float(layer.start)
    start = layer.decode()
    target = start.clone()
    target[0, 0] += 3 * step
    for _ in range(400):
        layer.backward(2 * (layer.decode() - target))
        layer.by_weight -= 0.02 * layer.by_weight.grad
    assert layer.decode()[0, 0] == pytest.approx(float(target[0, 0]), rel=1e-5)
    assert layer.by_weight[0, 3] == 0
    assert torch.equal(layer.decode()[0, 1:], start[0, 1:])


def test_a_linear_layer_with_correlated_inputs() -> None:
    weight = random(32, 64)
    inputs = random(512, 64, seed=1) @ (torch.eye(64) + 0.3 * random(64, 64, seed=2))
    gram = inputs.T @ inputs / 512

    def train(divisors: bool) -> float:
        layer = DividedWeight(weight, UniformGrid(bits=3, group_size=64), {})
        theta = layer.parameters(divisors)
        optimiser = torch.optim.Adam(theta, lr=3e-3)
        for _ in range(300):
            layer.backward(2 * (layer.decode() - weight) @ gram)
            optimiser.step()
        return missed(layer.code().decode())

    def missed(decoded: Tensor) -> float:
        return float((((decoded - weight) @ gram) * (decoded - weight)).sum())

    nearest = missed(UniformGrid(bits=3, group_size=64).quantize(weight).decode())
    steps, both = train(False), train(True)
    assert both < 0.9 * steps
    assert steps < nearest


@pytest.mark.parametrize("bits", [2, 3])
def test_a_block(bits: int, tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path), batches=8)
    grid = UniformGrid(bits=bits, group_size=32)
    told: list[dict[str, Any]] = []
    before = {name: session.weight(name) for name in session.names}
    rounding = FlexRound(steps=60, learning_rate=1e-2, checks=4)
    grids = dict.fromkeys(session.names, grid)
    codes = rounding.quantize_block(session, grids, {}, SolveOptions(), told.append)
    assert told[-1]["held_out_after"] < 0.95 * told[-1]["held_out_before"]
    plain = {name: grid.quantize(before[name]) for name in session.names}
    objective = BlockObjective(session)
    start = objective.held_out_loss({name: code.decode() for name, code in plain.items()}, {})
    end = objective.held_out_loss({name: code.decode() for name, code in codes.items()}, {})
    assert start == pytest.approx(told[-1]["held_out_before"], rel=1e-5)
    assert end == pytest.approx(told[-1]["held_out_after"], rel=1e-5)
    for name, code in codes.items():
        assert code.spec == plain[name].spec
        assert torch.equal(session.weight(name), before[name])


def test_export_is_what_was_trained() -> None:
    layer = DividedWeight(random(9, 40), UniformGrid(bits=3, group_size=16, scale_dtype="float32"), {})
    layer.by_group += 0.1 * random(*layer.by_group.shape, seed=2)
    layer.by_weight += 0.3 * random(9, 40, seed=3)
    assert torch.equal(layer.code().decode(), layer.decode())


def test_other_grids_are_refused(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    grids = dict.fromkeys(session.names, TritPlaneGrid())
    with pytest.raises(RecipeError, match="uniform grid"):
        FlexRound(steps=1).quantize_block(session, grids, {}, SolveOptions())
