"""Binary fields: moments, exact gradients, the KL term, limits, and two tasks one after the other."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.train.binary_fields import (
    BinaryFieldLinear,
    Penalty,
    _Sums,
    divergence,
    divergence_gradient,
    layers_of,
    likelihood,
    schedule,
    set_beta,
    train_perceptron,
    variance_of,
)


def test_sampled_weights_have_the_moments_of_the_sums() -> None:
    layer = BinaryFieldLinear(12, 3, beta=0.7)
    x = torch.randn(1, 12)
    layer.mode = "sample"
    theta = layer.theta.detach()
    drawn = 2 * (torch.rand(200_000, 3, 12) < torch.sigmoid(2 * 0.7 * theta)).float() - 1
    sums = drawn @ x[0] / math.sqrt(12)
    layer.mode = "mean"
    mean, spread = layer(x)[0].detach(), (layer.variances() @ x[0].square() / 12).sqrt()
    torch.testing.assert_close(sums.mean(0), mean, rtol=0.005, atol=0.006)
    torch.testing.assert_close(sums.std(0), spread, rtol=0.005, atol=0)
    layer.mode = "moments"
    gaussian = layer(x.expand(200_000, 12)).detach()
    torch.testing.assert_close(gaussian.mean(0), mean, rtol=0.005, atol=0.006)
    torch.testing.assert_close(gaussian.std(0), spread, rtol=0.006, atol=0)
    layer.mode = "sample"
    many = torch.stack([layer.sampled() for _ in range(4000)])
    assert set(many.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(many.mean(0), layer.means(), rtol=0, atol=5 / 4000**0.5)


def test_gradients_are_exact() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: _Sums.apply(a, b, 0.8, noise), (x, theta), atol=1e-9, rtol=1e-7)
    found = torch.autograd.grad((_Sums.apply(x, theta, 0.8, noise) * weights).sum(), (x, theta))
    field = 0.8 * theta
    by_autograd = x @ field.tanh().T / 5**0.5 + ((x.square() @ (1 - field.tanh() ** 2).T) / 5).sqrt() * noise
    expected = torch.autograd.grad((by_autograd * weights).sum(), (x, theta))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_where_there_is_no_deviation_there_is_no_gradient_of_it() -> None:
    theta = torch.full((2, 3), 500.0, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    result = _Sums.apply(x, theta, 1.0, torch.randn(4, 2))
    result.sum().backward()
    assert theta.grad is not None
    assert x.grad is not None
    assert float(theta.grad.abs().max()) < 1e-30
    torch.testing.assert_close(x.grad, torch.full((4, 3), 2 / 3**0.5))
    zero = torch.zeros(1, 3, requires_grad=True)
    _Sums.apply(zero, torch.randn(2, 3), 1.0, torch.randn(1, 2)).sum().backward()
    assert zero.grad is not None
    assert bool(zero.grad.isfinite().all())


def test_the_divergence() -> None:
    theta, previous = (torch.randn(6, dtype=torch.float64) for _ in range(2))
    theta.requires_grad_()
    (found,) = torch.autograd.grad(divergence(theta, previous, 1.3), theta)
    torch.testing.assert_close(found, divergence_gradient(theta.detach(), previous, 1.3), rtol=1e-9, atol=1e-12)
    p, q = (torch.sigmoid(2 * 1.3 * value.detach()) for value in (theta, previous))
    by_probabilities = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    torch.testing.assert_close(divergence(theta.detach(), previous, 1.3), by_probabilities)
    assert float(divergence(previous, previous, 1.3)) == pytest.approx(0, abs=1e-12)
    around = torch.linspace(-0.3, 0.3, 13, dtype=torch.float64)
    values = torch.stack([divergence(previous[:1] + step, previous[:1], 1.3) for step in around])
    assert bool((values[around.abs() > 1e-9] > 0).all())
    assert bool((values[2:] - 2 * values[1:-1] + values[:-2] > 0).all())
    far = divergence_gradient(torch.tensor([30.0, -30.0]), torch.zeros(2), 1.0)
    assert float(far.abs().max()) < 1e-20
    assert float(variance_of(torch.tensor(12.0))) == pytest.approx(4 * math.exp(-24), rel=1e-5)
    assert bool(divergence(torch.tensor([1e4]), torch.tensor([-1e4]), 1.0).isfinite())


def test_at_low_temperature_it_is_the_network_of_signs() -> None:
    model = nn.Sequential(BinaryFieldLinear(8, 16), nn.ReLU(), BinaryFieldLinear(16, 3))
    set_beta(model, 1e6)
    x = torch.randn(5, 8)
    soft = model(x)
    for layer in layers_of(model):
        layer.mode = "sign"
    torch.testing.assert_close(soft.detach(), model(x), rtol=1e-5, atol=1e-6)


def test_the_perceptron_learns_a_teacher() -> None:
    size, examples = 200, 40
    teacher = torch.randn(size).sign()
    x = torch.randn(examples, size).sign()
    y = (x @ teacher).sign() + (x @ teacher == 0).float()
    start = 0.1 * torch.randn(size)
    learned, losses = train_perceptron(start, x, y, lambda p: torch.optim.SGD(p, lr=20.0), 150)
    assert sum(after > before for before, after in zip(losses[:-1], losses[1:], strict=True)) <= 5
    assert losses[-1] < losses[0] / 5
    answers = (x @ torch.where(learned >= 0, 1.0, -1.0)).sign()
    assert bool((answers == y).all())
    held, _ = train_perceptron(learned, x, -y, lambda p: torch.optim.SGD(p, lr=1.0), 50, previous=learned, weight=0.1)
    free, _ = train_perceptron(learned, x, -y, lambda p: torch.optim.SGD(p, lr=1.0), 50)
    assert float((held - learned).norm()) < float((free - learned).norm())
    exact = 0.5 * torch.erfc(-y * (x @ learned.tanh()) / variance_of(learned).sum().sqrt() / 2**0.5)
    torch.testing.assert_close(likelihood(learned, x, y), -exact.log().mean())


def two_tasks(kind: Literal["task", "stream"] | None, weight: float) -> tuple[float, float, Tensor]:
    """Accuracy on the first task and on the second, after both; and how far fields of the first's inputs moved."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = nn.Sequential(BinaryFieldLinear(40, 64), nn.ReLU(), BinaryFieldLinear(64, 2))
    with torch.no_grad():
        for layer in layers_of(model):
            layer.theta *= 0.3
    set_beta(model, 2.0)
    data = []
    for _ in range(2):
        x = torch.randn(400, 40, generator=generator)
        data.append((x, (x @ torch.randn(40, generator=generator) > 0).long()))
    moved = torch.zeros(0)
    for task, (x, y) in enumerate(data):
        optimiser = torch.optim.SGD(model.parameters(), lr=2.0)
        penalty = Penalty(model, kind, weight) if kind else None
        before = layers_of(model)[0].theta.detach().clone()
        for step in range(120):
            part = torch.arange(step * 50, step * 50 + 50) % 400
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            if penalty:
                penalty.add()
            optimiser.step()
        if task == 0:
            for layer in layers_of(model):
                layer.remember()
        moved = layers_of(model)[0].theta.detach() - before
    for layer in layers_of(model):
        layer.mode = "mean"
    first, second = (float((model(x).argmax(1) == y).float().mean()) for x, y in data)
    return first, second, moved


def test_the_penalty_keeps_the_first_task() -> None:
    free, held = two_tasks(None, 0.0), two_tasks("task", 0.003)
    assert held[0] > free[0] + 0.05
    assert held[1] > 0.7
    stream = two_tasks("stream", 0.05)
    assert float(stream[2].norm()) != float(free[2].norm())


def test_the_stream_term_is_that_of_the_last_step() -> None:
    layer = BinaryFieldLinear(3, 2, beta=1.5)
    penalty = Penalty(layer, "stream", 2.0)
    before = layer.theta.detach().clone()
    layer.theta.grad = torch.ones(2, 3)
    penalty.add()
    assert torch.equal(layer.theta.grad, torch.ones(2, 3))
    with torch.no_grad():
        layer.theta += 0.3
    layer.theta.grad = torch.zeros(2, 3)
    penalty.add()
    expected = 2 * 1.5**2 * layer.variances() * (layer.theta.detach() - before)
    torch.testing.assert_close(layer.theta.grad, expected)


def test_fields_of_inputs_that_a_task_does_not_have_stay() -> None:
    """ "task", a new optimiser: the first task has the first ten inputs, the second the others."""
    layer = BinaryFieldLinear(20, 2, beta=1.0)
    for task, used in enumerate((slice(0, 10), slice(10, 20))):
        x = torch.zeros(100, 20)
        x[:, used] = torch.randn(100, 10)
        y = (x.sum(1) > 0).long()
        optimiser, penalty = torch.optim.Adam(layer.parameters(), lr=0.05), Penalty(layer, "task")
        before = layer.theta.detach().clone()
        for _ in range(20):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(x), y).backward()
            penalty.add()
            optimiser.step()
        layer.remember()
        moved = (layer.theta.detach() - before).abs()
        other = slice(10, 20) if task == 0 else slice(0, 10)
        assert float(moved[:, other].max()) == 0
        assert float(moved[:, used].min()) > 0


def test_settings_and_refusals() -> None:
    assert schedule(5, 5) == pytest.approx(10 * math.tanh(2.1))
    assert schedule(20, 80, tasks=2) == pytest.approx(10 * math.tanh(0.35))
    with pytest.raises(FeatherError, match="not among"):
        schedule(0, 5)
    with pytest.raises(FeatherError, match="no BinaryFieldLinear"):
        Penalty(nn.Linear(2, 2), "task")
