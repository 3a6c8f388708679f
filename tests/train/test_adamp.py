"""AdamP and SGDP: Pythagoras, the optimisers that they are without projection, growth of norms, who is flagged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.train.adamp import SGDP, AdamP, project


def orthogonal(gradient: Tensor, weight: Tensor) -> Tensor:
    unit = weight / weight.norm(dim=1, keepdim=True)
    return gradient - unit * (unit * gradient).sum(1, keepdim=True)


@pytest.mark.parametrize("make", [lambda p: AdamP(p, 0.05), lambda p: SGDP(p, 0.05, 0.9, nesterov=True)])
def test_a_projected_step_is_orthogonal_to_each_channel(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    p = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    optimiser = make([p])
    for _ in range(4):
        before = p.detach().clone()
        p.grad = orthogonal(torch.randn(5, 7, dtype=torch.float64), before)
        optimiser.step()
        moved = p.detach() - before
        torch.testing.assert_close(
            p.detach().square().sum(1), before.square().sum(1) + moved.square().sum(1), rtol=1e-9, atol=0
        )
        assert float(moved.abs().min()) > 0
    assert optimiser.projected() == 1  # type: ignore[attr-defined]


def decoupled_sgd(w: Tensor, gradients: list[Tensor], rate: float, momentum: float, decay: float) -> Tensor:
    buffer = torch.zeros_like(w)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        w = w * (1 - rate * decay / (1 - momentum)) - rate * buffer
    return w


@pytest.mark.parametrize(("shape", "delta"), [((6, 4), 0.0), ((9,), 0.1), ((9,), 10.0)])
def test_without_projection_they_are_adamw_and_decoupled_sgd(shape: tuple[int, ...], delta: float) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(30)]
    trained = {}
    for name in ("adamp", "adamw", "sgdp"):
        p = start.clone().requires_grad_()
        optimiser: torch.optim.Optimizer
        if name == "adamw":
            optimiser = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
        elif name == "adamp":
            optimiser = AdamP([p], 0.01, weight_decay=0.1, delta=delta)
        else:
            optimiser = SGDP([p], 0.01, 0.8, weight_decay=0.1, delta=delta)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimiser.step()
        trained[name] = p.detach()
    torch.testing.assert_close(trained["adamp"], trained["adamw"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(trained["sgdp"], decoupled_sgd(start, gradients, 0.01, 0.8, 0.1), rtol=1e-12, atol=0)


MATRIX = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
FORM = MATRIX @ MATRIX.T / 12


def gradient_of_direction(w: Tensor) -> Tensor:
    """Of u'Au with u = w / |w|."""
    w = w.detach().requires_grad_()
    u = w / w.norm()
    (u @ FORM @ u.T).sum().backward()
    assert w.grad is not None
    return w.grad


def test_norms_grow_as_the_identity_says() -> None:
    """Momentum adds twice the sum over old steps to what a step adds by its own length."""
    rate, beta = 0.1, 0.9
    p = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    optimiser = SGDP([p], rate, beta, delta=0.0)
    start, lengths = p.detach().square().sum().item(), list[float]()
    for t in range(50):
        before = p.detach().square().sum().item()
        p.grad = gradient_of_direction(p)
        optimiser.step()
        lengths.append(optimiser.state[p]["momentum_buffer"].square().sum().item())
        cross = sum(beta ** (t - k) * lengths[k] for k in range(t))
        assert p.detach().square().sum().item() == pytest.approx(
            before + rate**2 * lengths[t] + 2 * rate**2 * cross, rel=1e-9
        )
    assert p.detach().square().sum().item() - start > 5 * rate**2 * sum(lengths)


def test_with_the_projection_only_the_steps_own_length_is_added() -> None:
    p = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    optimiser = SGDP([p], 0.1, 0.9)
    plain = p.detach().clone().requires_grad_()
    other = SGDP([plain], 0.1, 0.9, delta=0.0)
    for _ in range(50):
        before = p.detach().clone()
        p.grad = gradient_of_direction(p)
        optimiser.step()
        moved = p.detach() - before
        assert float(p.detach().square().sum() - before.square().sum()) == pytest.approx(
            float(moved.square().sum()), rel=1e-6, abs=1e-12
        )
        plain.grad = gradient_of_direction(plain)
        other.step()
    assert p.norm().item() < plain.norm().item()


def test_without_momentum_the_projection_changes_nothing() -> None:
    start = torch.randn(1, 12, dtype=torch.float64)
    found = []
    for delta in (0.0, 0.1):
        p = start.clone().requires_grad_()
        optimiser = SGDP([p], 0.1, delta=delta)
        for _ in range(50):
            p.grad = gradient_of_direction(p)
            optimiser.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def flagged(weight: Tensor, gradient: Tensor) -> bool:
    _, ratio = project(weight, gradient, gradient, delta=0.1, wd_ratio=0.1, eps=1e-8)
    return float(ratio) < 1


@pytest.mark.parametrize("rows", [1, 2])
def test_gaussian_gradients_are_flagged_as_often_as_the_half_normal_says(rows: int) -> None:
    """One row: 0.080. Two rows: that squared for the channels, and 0.080 for the layer, which is tried afterwards."""
    trials = 3000
    one = math.erf(0.1 / math.sqrt(2))
    assert one == pytest.approx(0.080, abs=5e-4)
    expected = one if rows == 1 else one**2 + one - one**3
    found = sum(flagged(torch.randn(rows, 64), torch.randn(rows, 64)) for _ in range(trials)) / trials
    assert abs(found - expected) < 4 * math.sqrt(expected / trials)
    weight = torch.randn(3, 5)
    assert not flagged(weight, 2 * weight)
    assert flagged(weight, torch.zeros(3, 5))
    assert flagged(weight.bfloat16(), orthogonal(torch.randn(3, 5), weight.bfloat16().float()))


def test_one_aligned_row_leaves_the_layer_view_its_word() -> None:
    weight = torch.eye(2, 16)
    gradient = torch.zeros(2, 16)
    gradient[0, 0], gradient[1, 1] = 1.0, -1.0  # along both rows, but orthogonal over the layer
    step = torch.ones(2, 16)
    cut, ratio = project(weight, gradient, step, delta=0.1, wd_ratio=0.1, eps=1e-12)
    assert float(ratio) == pytest.approx(0.1)
    torch.testing.assert_close(cut, step - weight * (weight * step).sum() / 2)


def test_weights_before_a_normalisation_are_flagged_and_the_classifier_is_not() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    conv, classifier = net[0].weight, net[4].weight
    with torch.no_grad():
        net[0].weight.data = conv.detach().contiguous(memory_format=torch.channels_last)
    counts = [0, 0]
    optimiser = AdamP(net.parameters(), 1e-3)
    for _ in range(20):
        x, y = torch.randn(32, 3, 6, 6), torch.randint(4, (32,))
        x[torch.arange(32), 0, 0, 0] += 3 * y
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        for place, weight in enumerate((conv, classifier)):
            assert weight.grad is not None
            counts[place] += flagged(weight.detach(), weight.grad)
        optimiser.step()
    assert counts[0] == 20
    assert counts[1] <= 6


def test_what_cannot_be_is_said() -> None:
    p = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(FeatherError, match="0 or more"):
        AdamP([p], -1.0)
    with pytest.raises(FeatherError, match="below 1"):
        SGDP([p], 0.1, 1.0)
