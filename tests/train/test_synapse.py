"""Pulse counters: the curve, drift under equal pulses, refresh, random pulses, and learning by both rules."""

from __future__ import annotations

import math
import os
import statistics
from typing import Literal

import pytest
import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.train.synapse import (
    Bidirectional,
    Devices,
    SynapseNetwork,
    SynapseSettings,
    Unidirectional,
    directions,
)

RULES: tuple[Literal["unidirectional", "bidirectional"], ...] = ("unidirectional", "bidirectional")
TAUS = (math.inf, 1.0, 0.5, 0.2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", TAUS)
def test_the_curve(share: float) -> None:
    devices = Devices(pulses=32, tau=32 * share)
    table = devices.table()
    assert table[0].item() == pytest.approx(devices.least)
    assert table[-1].item() == pytest.approx(devices.most)
    steps = table.diff()
    assert bool((steps > 0).all())
    if math.isinf(share):
        torch.testing.assert_close(steps, steps.mean().expand(32))
    else:
        assert bool((steps.diff() < 0).all())
    n = torch.arange(33)
    torch.testing.assert_close(devices.counted(devices.grown(n)), n.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", TAUS)
def test_drift_under_equal_pulses(share: float) -> None:
    """Unidirectional: none where both counters are alike, else towards zero; bidirectional: none at mid-range alone."""
    devices = Devices(pulses=32, tau=32 * share)
    table = devices.table()
    found = []
    for sign in (1, -1):
        pairs = Unidirectional((32, 32), devices, generator())
        n = torch.arange(32, dtype=torch.int8)
        pairs.plus, pairs.minus, pairs.gain = n.repeat(32, 1).T.contiguous(), n.repeat(32, 1), 1.0
        before = pairs.weight()
        pairs.pulse(torch.full((32, 32), sign, dtype=torch.int8))
        found.append(pairs.weight() - before)
    drift = (found[0] + found[1]) / 2
    steps = table.diff()
    torch.testing.assert_close(drift, (steps.unsqueeze(1) - steps) / 2, rtol=1e-4, atol=1e-6)
    assert float(drift.diagonal().abs().max()) < 1e-7
    if not math.isinf(share):
        assert bool((drift.triu(1)[torch.ones(32, 32).triu(1) > 0] > 0).all())  # weights below 0 rise

    single = Bidirectional((1, 9), devices, generator())
    single.share = torch.linspace(0.1, 0.9, 9).unsqueeze(0)
    up, down = single.steps()
    if math.isinf(share):
        torch.testing.assert_close(up, down, rtol=1e-4, atol=1e-6)
    else:
        assert bool((up[0, :4] > down[0, :4] * 1.05).all())
        assert bool((up[0, 5:] < down[0, 5:] / 1.05).all())
        assert up[0, 4].item() == pytest.approx(down[0, 4].item(), rel=1e-3)


@pytest.mark.parametrize("share", TAUS)
def test_a_refresh_keeps_the_weight(share: float) -> None:
    devices = Devices(pulses=32, tau=32 * share)
    pairs = Unidirectional((33, 33), devices, generator())
    n = torch.arange(33, dtype=torch.int8)
    pairs.plus, pairs.minus = n.repeat(33, 1).T.contiguous(), n.repeat(33, 1)
    before = pairs.weight() / pairs.gain
    pairs.refresh(torch.ones(33, 33, dtype=torch.bool))
    after = pairs.weight() / pairs.gain
    assert bool((before * after >= 0).all())
    assert bool((torch.minimum(pairs.plus, pairs.minus) == 0).all())
    level = torch.maximum(pairs.plus, pairs.minus).long()
    steps = devices.table().diff()
    spacing = torch.maximum(steps[level.clamp(max=31)], steps[(level - 1).clamp(min=0)])
    inside = before.abs() <= (devices.table()[31] - devices.least)
    assert bool(((after - before).abs() <= spacing / 2 + 1e-6)[inside].all())
    assert bool(((after - before).abs() <= steps[-1] + 1e-6)[~inside].all())


def test_counters_stay_in_their_range() -> None:
    pairs = Unidirectional((8, 8), Devices(pulses=5, tau=2.0, pulse_variation=0.3), generator(), refreshed=0.3)
    for step in range(300):
        pairs.pulse(torch.randint(-1, 2, (8, 8), generator=generator(step)).to(torch.int8))
        for counter in (pairs.plus, pairs.minus):
            assert 0 <= int(counter.min()) <= int(counter.max()) <= 5


def test_a_straight_line_is_descent_by_signs_on_a_grid() -> None:
    devices = Devices(pulses=100, least=0.0)
    pairs = Unidirectional((3, 4), devices, generator())
    step = pairs.gain * (devices.most - devices.least) / 100
    expected = pairs.weight()
    for i in range(20):
        delta, x = torch.randn(1, 3, generator=generator(i)), torch.randn(1, 4, generator=generator(100 + i))
        expected = expected - step * (delta.T @ x).sign()
        pairs.pulse(directions(delta, x, generator=generator()))
        torch.testing.assert_close(pairs.weight(), expected, rtol=1e-4, atol=1e-5)
    assert not bool(directions(torch.zeros(1, 3), x, generator=generator()).any())


def test_random_pulses_are_proportional_in_the_mean() -> None:
    delta, x = torch.tensor([[0.2, -0.5]]), torch.tensor([[1.0, -0.4, 0.0]])
    draws = generator()
    mean = torch.stack([directions(delta, x, rate=1.5, generator=draws).float() for _ in range(6000)]).mean(0)
    torch.testing.assert_close(mean, -1.5 * delta.T @ x, rtol=0, atol=5 / 6000**0.5)


def test_devices_and_pulses_vary() -> None:
    plain, varied = (Unidirectional((50, 50), Devices(device_variation=s), generator()) for s in (0.0, 0.2))
    assert torch.equal(plain.plus, varied.plus)
    ratio = (varied.conductances()[0] - 0.02) / (plain.conductances()[0] - 0.02)
    assert float(ratio[plain.plus > 0].std()) == pytest.approx(0.2, rel=0.1)
    noisy = Unidirectional((50, 50), Devices(pulse_variation=0.3), generator())
    before = noisy.conductances()[0]
    noisy.pulse(torch.ones(50, 50, dtype=torch.int8))
    grown = noisy.conductances()[0] - before
    assert float(grown.std() / grown.mean()) == pytest.approx(0.3, rel=0.1)


def accuracy(settings: SynapseSettings, data: tuple[Tensor, Tensor], epochs: int) -> float:
    """On the last quarter of the data, after training on the rest."""
    x, y = data
    cut = len(x) * 3 // 4
    network = SynapseNetwork(settings)
    for epoch in range(epochs):
        order = torch.randperm(cut, generator=generator(epoch))
        for part in order.split(16):
            network.learn(x[part], y[part])
    return float((network.forward(x[cut:]).argmax(1) == y[cut:]).float().mean())


SEEDS = 5 if "FEATHERWEIGHT_LONG_TESTS" in os.environ else 1


def test_digits_are_learned_and_better_with_pulses_of_one_direction() -> None:
    """On a strongly bent curve; the baseline's weights are drawn to mid-range the longer it trains."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=generator(7))[:600]
    data = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order].long()
    devices = Devices(pulses=64, tau=64 * 0.2)
    one, two = (
        statistics.mean(
            accuracy(SynapseSettings((64, 32, 10), devices, rule, seed=seed), data, 8) for seed in range(SEEDS)
        )
        for rule in RULES
    )
    assert one > two + 0.03, (one, two)
    assert one > 0.7


def test_the_exclusive_or_is_learned() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([0, 1, 1, 0])
    network = SynapseNetwork(SynapseSettings((2, 16, 2), Devices(pulses=64), busy=0.2))
    losses = [network.learn(x, y) for _ in range(150)]
    assert losses[-1] < losses[0] / 2
    assert network.forward(x).argmax(1).tolist() == y.tolist()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(FeatherError, match="1 to 127 pulses"):
        Devices(pulses=300)
    with pytest.raises(FeatherError, match="tau above 0"):
        Devices(tau=0.0)
    with pytest.raises(FeatherError, match="two or more sizes"):
        SynapseNetwork(SynapseSettings((3,)))
