"""Gradients against autograd of surrogates, closed forms and central differences; what is frozen; oscillation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from low_bit import layer_of, normal, uniform
from torch import Tensor, nn

from featherweight.methods.train.activations.elastic import BEGUN, SCALE, ElasticInputs
from featherweight.methods.train.flips import Flips
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import guard, prepare, set_clock


def gradient(layer: LowBitLinear, inputs: Tensor, upstream: Tensor) -> Tensor:
    layer.zero_grad()
    layer(inputs).backward(upstream)
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


@pytest.mark.parametrize(
    "forward", [{"kind": "absmean"}, {"kind": "statsq"}, {"kind": "sherry"}, {"kind": "binary"}], ids=str
)
def test_identity_is_that_of_the_rounded_matrix(forward: dict[str, Any]) -> None:
    """Every entry, also far outside, has the gradient of the matrix that is multiplied by."""
    weight = 5 * normal(6, 16)
    layer, inputs, upstream = layer_of(weight, forward), normal(7, 16, seed=1), normal(7, 6, seed=2)
    assert torch.equal(gradient(layer, inputs, upstream), upstream.T @ inputs)


def test_clipped_ends_at_the_largest_value() -> None:
    weight = normal(6, 16)
    layer = layer_of(weight, {"kind": "absmean"}, backward={"kind": "clipped", "limit": 1.5})
    inputs, upstream = normal(7, 16, seed=1), normal(7, 6, seed=2)
    inside = weight.abs() <= 1.5 * layer.rounded().scales
    assert 0 < int((~inside).sum()) < inside.numel()
    assert torch.equal(gradient(layer, inputs, upstream), (upstream.T @ inputs) * inside)


def test_lsq_against_central_differences() -> None:
    """Of the forward pass with the rounding's residual held fixed, for every scale; float32 scales do not move it."""
    weight = normal(4, 8)
    forward = {"kind": "elastic", "scope": "group", "group_size": 4, "scale_dtype": "float32", "bits": 3}
    layer = layer_of(weight, forward, backward={"kind": "lsq"})
    inputs, upstream = normal(5, 8, seed=1), normal(5, 4, seed=2)
    gradient(layer, inputs, upstream)
    assert layer.learned is not None
    assert layer.learned.grad is not None
    scales = layer.rounded().scales.repeat_interleave(4, 1)
    residual = (weight / scales).clamp(-4, 3).round() - (weight / scales).clamp(-4, 3)

    def output(held: Tensor) -> float:
        spread = held.repeat_interleave(4, 1)
        value = spread * ((weight / spread).clamp(-4, 3) + residual)
        return float((inputs @ value.T * upstream).sum())

    step = 1e-6
    for place in ((0, 0), (1, 1), (3, 0)):
        change = torch.zeros_like(layer.learned)
        change[place] = step
        base = layer.rounded().scales
        difference = (output(base + change) - output(base - change)) / (2 * step)
        assert float(layer.learned.grad[place]) == pytest.approx(difference / math.sqrt(4 * 3), rel=1e-4, abs=1e-7)


def test_lsq_stops_latents_outside() -> None:
    weight = torch.tensor([[10.0, 0.3, -10.0, -0.2]], dtype=torch.float64)
    layer = layer_of(weight, {"kind": "elastic", "scope": "tensor", "scale_dtype": "float32"}, backward={"kind": "lsq"})
    assert layer.learned is not None
    layer.learned.data.fill_(1.0)
    inputs = torch.ones(1, 4, dtype=torch.float64)
    assert gradient(layer, inputs, torch.ones(1, 1, dtype=torch.float64)).tolist() == [[0, 1, 0, 1]]
    assert layer.learned.grad is not None
    # +1 and -1 from outside, -0.3 and +0.2 from inside, over sqrt(4 weights)
    assert float(layer.learned.grad) == pytest.approx((1 - 0.3 - 1 + 0.2) / 2)


def test_the_dead_zone_rule_changes_gradients_and_no_output() -> None:
    weight, inputs, upstream = normal(6, 16), normal(7, 16, seed=1), normal(7, 6, seed=2)
    plain = layer_of(weight, {"kind": "absmean"})
    ruled = layer_of(weight, {"kind": "absmean"}, backward={"kind": "dead-zone", "strength": 0.3})
    assert torch.equal(plain(inputs), ruled(inputs))
    dead = (plain.rounded().digits == 0).double()
    expected = upstream.T @ inputs + 0.3 * upstream.sum(0).unsqueeze(1) * dead
    assert torch.allclose(gradient(ruled, inputs, upstream), expected, rtol=1e-12, atol=1e-12)


# CGA -----------------------------------------------------------------------------------------------------------------


def frozen_training(held_scale: bool) -> tuple[LowBitLinear, Tensor, Tensor]:
    weight = uniform(8, 64)
    layer = layer_of(weight, {"kind": "statsq"}, backward={"kind": "cga", "band": 0.05, "begin": 0.5})
    layer.set_clock(type(layer.clock)(6, 10))
    frozen = layer.choices.backward.frozen(layer, layer.choices.forward, None)
    assert frozen is not None
    before = layer.weight.detach().clone()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-3 if not held_scale else 1e-5, weight_decay=0.5)
    guard(optimiser, layer)
    for seed in range(5):
        gradient(layer, normal(3, 64, seed=seed), normal(3, 8, seed=seed + 9))
        optimiser.step()
    return layer, before, frozen


def test_frozen_weights_keep_their_bits() -> None:
    layer, before, frozen = frozen_training(held_scale=False)
    assert torch.equal(layer.weight[frozen], before[frozen])
    assert not torch.equal(layer.weight[~frozen], before[~frozen])


def test_the_share_that_is_trained_is_that_of_the_band() -> None:
    layer, _, frozen = frozen_training(held_scale=True)
    assert float((~frozen).double().mean()) == pytest.approx(2 * 0.05 * 3 / 4, abs=0.03)


def test_before_the_phase_everything_is_trained() -> None:
    layer = layer_of(uniform(8, 64), {"kind": "statsq"}, backward={"kind": "cga", "begin": 0.5})
    layer.set_clock(type(layer.clock)(4, 10))
    inputs, upstream = normal(7, 64, seed=1), normal(7, 8, seed=2)
    assert torch.equal(gradient(layer, inputs, upstream), upstream.T @ inputs)


def oscillation(rule: dict[str, Any], seed: int, steps: int = 320) -> tuple[int, float]:
    """A least-squares problem of 32 weights of two bits, by SGD with batches of 32: in the last quarter, flips that
    take back the one before, and the mean expected loss."""
    model = nn.Sequential(nn.Linear(32, 1, bias=False, dtype=torch.float64))
    target, data = normal(1, 32, seed=seed), normal(steps, 32, 32, seed=seed + 100)
    with torch.no_grad():
        model[0].weight.copy_(target)
    prepare(model, {"forward": {"kind": "statsq"}, "backward": rule})
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    guard(optimiser, model)
    flips, reversals, losses = Flips(model), 0, []
    for step in range(steps):
        set_clock(model, step, steps)
        optimiser.zero_grad()
        (model(data[step]) - data[step] @ target.T).square().mean().backward()
        optimiser.step()
        counted = flips.counted()
        if step >= 3 * steps // 4:
            reversals += counted.reversals
            losses.append(float((model[0].rounded().value - target).square().sum()))
    return reversals, sum(losses) / len(losses)


def test_cga_ends_oscillation() -> None:
    """More than 100 times fewer reversals, and no higher loss, over two seeds together."""
    plain = [oscillation({"kind": "identity"}, seed) for seed in (0, 2)]
    annealed = [oscillation({"kind": "cga", "band": 0.005, "begin": 0.75}, seed) for seed in (0, 2)]
    assert sum(found for found, _ in plain) > 500
    assert 100 * sum(found for found, _ in annealed) < sum(found for found, _ in plain)
    assert sum(loss for _, loss in annealed) <= sum(loss for _, loss in plain)


# Elastic inputs ------------------------------------------------------------------------------------------------------


def elastic(scale: float, **settings: Any) -> LowBitLinear:
    layer = layer_of(torch.eye(4, dtype=torch.float64), {"kind": "binary"}, activation={"kind": "elastic", **settings})
    layer.own(SCALE).data.fill_(scale)
    layer.own(BEGUN).fill_(True)
    return layer


@pytest.mark.parametrize(("position", "slope"), [(10.0, 1.0), (0.3, -0.3), (-10.0, -1.0)])
def test_the_gradient_of_an_input_scale(position: float, slope: float) -> None:
    layer = elastic(0.5)
    inputs = torch.zeros(1, 4, dtype=torch.float64)
    inputs[0, 0] = 0.5 * position
    inputs.requires_grad_()
    rounded = layer.choices.activation.rounded(layer, inputs)
    rounded.backward(torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64))
    assert float(layer.own(SCALE).grad) == pytest.approx(3 * slope / math.sqrt(4), rel=1e-6)
    assert inputs.grad is not None
    assert float(inputs.grad[0, 0]) == (3.0 if abs(position) < 1 else 0.0)


def test_levels_of_inputs() -> None:
    layer = elastic(0.25, symmetric=False)
    probabilities = normal(5, 4).softmax(-1)
    rounded = layer.choices.activation.rounded(layer, probabilities)
    assert len(rounded.detach().unique()) <= 3
    assert float(rounded.detach().min()) == float(probabilities.min())
    assert bool((rounded >= 0).all())
    sign = elastic(0.7, bits=1)
    positive = normal(5, 4).abs() + 0.1
    assert sign.choices.activation.rounded(sign, positive).detach().unique().tolist() == pytest.approx([0.7], abs=1e-6)


def test_the_first_batch_sets_the_scale_once() -> None:
    layer = layer_of(torch.eye(4, dtype=torch.float64), {"kind": "binary"}, activation={"kind": "elastic"})
    inputs = normal(6, 4)
    layer(inputs)
    first = float(layer.own(SCALE).detach())
    assert first == pytest.approx(2 * float(inputs.abs().mean()), rel=1e-6)
    layer(10 * inputs)
    assert float(layer.own(SCALE)) == first
    other = layer_of(torch.eye(4, dtype=torch.float64), {"kind": "binary"}, activation={"kind": "elastic"})
    other.load_state_dict(layer.state_dict())
    other(10 * inputs)
    assert float(other.own(SCALE)) == first
    assert isinstance(layer.choices.activation, ElasticInputs)


def test_integer_inputs_are_those_of_the_kernel() -> None:
    """The largest of a token is 127 steps, a token of zeros is zeros, and the gradient goes straight through."""
    layer = layer_of(torch.eye(4), {"kind": "binary"}, activation={"kind": "integers"})
    inputs = torch.tensor([[1.0, -2.54, 0.3, 0.01], [0, 0, 0, 0]], requires_grad=True)
    rounded = layer.choices.activation.rounded(layer, inputs)
    step = float(torch.tensor(2.54 / 127).half())
    assert rounded[0].detach().tolist() == pytest.approx([step * q for q in (50, -127, 15, 0)], rel=1e-6)
    assert rounded[1].detach().tolist() == [0, 0, 0, 0]
    rounded.sum().backward()
    assert inputs.grad is not None
    assert bool((inputs.grad == 1).all())
