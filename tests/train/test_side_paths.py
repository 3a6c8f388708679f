"""Tequila's bias, Arenas, HGF: gradients, folding, bytes, planted problems; schedules and what follows the clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from low_bit import layer_of, normal
from torch import Tensor, nn

from featherweight.methods.quantize.choosing import choice_on
from featherweight.methods.train.base import Clock
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import make_optimiser, parameter_groups, prepare, set_clock, set_rates
from featherweight.methods.train.recipe import train_recipe
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sum import Sum

ABSMEAN = {"kind": "absmean", "scope": "group", "group_size": 8, "ties": "kept", "scale_dtype": "float32"}


def gradients(layer: LowBitLinear, inputs: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    layer(inputs).backward(upstream)
    assert inputs.grad is not None
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return found | {"inputs": inputs.grad}


# Tequila -------------------------------------------------------------------------------------------------------------


def test_tequila_is_autograd_of_its_surrogate() -> None:
    """Y = X (A + W - sg(W))^T + lambda sum of the dead, with the gradient of X through A alone."""
    weight, inputs, upstream = normal(6, 16), normal(7, 16, seed=1), normal(7, 6, seed=2)
    layer = layer_of(weight, ABSMEAN, side={"kind": "tequila", "strength": 0.37})
    found = layer.rounded()
    latent, x = weight.clone().requires_grad_(), inputs.clone().requires_grad_()
    product = inputs @ (found.value + latent - latent.detach()).T + (x - x.detach()) @ found.value.T
    bias = 0.37 * (latent * (found.digits == 0)).sum(1)
    (product + bias).backward(upstream)
    assert torch.allclose(layer(inputs), (product + bias).detach(), rtol=1e-12, atol=1e-12)
    ours = gradients(layer, inputs, upstream)
    assert latent.grad is not None
    assert x.grad is not None
    assert torch.allclose(ours["weight"], latent.grad, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ours["inputs"], x.grad, rtol=1e-12, atol=1e-12)


def test_tequila_without_inputs_is_its_bias() -> None:
    layer = layer_of(normal(6, 16), ABSMEAN, side={"kind": "tequila", "strength": 0.25})
    inputs, upstream = torch.zeros(2, 16, dtype=torch.float64), normal(2, 6, seed=2)
    dead = (layer.rounded().digits == 0).double()
    bias = 0.25 * (layer.weight.detach() * dead).sum(1)
    assert torch.allclose(layer(inputs), bias.expand(2, 6), rtol=1e-12, atol=0)
    expected = 0.25 * upstream.sum(0).unsqueeze(1) * dead
    assert torch.allclose(gradients(layer, inputs, upstream)["weight"], expected, rtol=1e-12, atol=0)


def test_tequila_of_no_strength_is_plain() -> None:
    weight, inputs, upstream = normal(6, 16), normal(7, 16, seed=1), normal(7, 6, seed=2)
    plain = layer_of(weight, ABSMEAN)
    layer = layer_of(weight, ABSMEAN, side={"kind": "tequila", "strength": 0.0})
    assert torch.equal(layer(inputs), plain(inputs))
    for name, gradient in gradients(plain, inputs, upstream).items():
        assert torch.equal(gradient, gradients(layer, inputs, upstream)[name])


def test_tequila_as_it_is_stored() -> None:
    weight, inputs = normal(6, 16), normal(7, 16, seed=1)
    layer = layer_of(weight, ABSMEAN, bias=True, side={"kind": "tequila", "strength": 0.25})
    bias = layer.stored_bias()
    assert bias is not None
    stored = inputs @ layer.code().decode().double().T + bias
    assert torch.allclose(stored, layer(inputs), rtol=0, atol=1e-12)


def test_dead_weights_are_not_trapped() -> None:
    """Inputs of mean zero and a systematic bias of the output: plain dead weights drift nowhere, Tequila's together."""
    weight, inputs = normal(1, 64), normal(4000, 64, seed=1)
    inputs = inputs - inputs.mean(0)
    upstream = torch.full((4000, 1), 1 / 4000, dtype=torch.float64)
    for strength in (0.0, 0.1):
        layer = layer_of(weight, ABSMEAN, side={"kind": "tequila", "strength": strength})
        dead = layer.rounded().digits == 0
        moved = gradients(layer, inputs, upstream)["weight"][dead]
        assert moved.tolist() == pytest.approx([strength] * len(moved), abs=1e-12)


# Arenas --------------------------------------------------------------------------------------------------------------


def test_arenas_rises_falls_and_is_gone() -> None:
    side = choice_on("side", {"kind": "arenas"})
    assert [side.strength(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    weight, inputs = normal(6, 16), normal(7, 16, seed=1)
    layer = layer_of(weight, {"kind": "sherry", "group_size": 8}, side={"kind": "arenas"})
    plain = layer(inputs)
    layer.set_clock(Clock(10, 100))
    assert torch.allclose(layer(inputs), plain + inputs @ weight.T, rtol=1e-12, atol=1e-12)
    upstream = normal(7, 6, seed=2)
    both = upstream.T @ inputs
    assert torch.allclose(gradients(layer, inputs, upstream)["weight"], 2 * both, rtol=1e-12)
    layer.eval()
    for step in (0, 10, 55):
        layer.set_clock(Clock(step, 100))
        assert torch.equal(layer(inputs), plain)


def test_the_clock_is_saved_with_the_layer() -> None:
    layer, other = (layer_of(normal(6, 16), {"kind": "sherry", "group_size": 8}, side={"kind": "arenas"}) for _ in "ab")
    layer.set_clock(Clock(7, 100))
    other.load_state_dict(layer.state_dict())
    assert other.clock == Clock(7, 100)
    inputs = normal(7, 16, seed=1)
    assert torch.equal(layer(inputs), other(inputs))


# HGF -----------------------------------------------------------------------------------------------------------------

TENSOR = {"kind": "absmean", "scope": "tensor", "scale_dtype": "float32"}


def hgf(weight: Tensor, **settings: Any) -> LowBitLinear:
    side = {"kind": "hgf", "rank": 2, "factor_dtype": "float32", **settings}
    return layer_of(weight, TENSOR, side=side)


def test_hgf_begins_as_the_plain_layer() -> None:
    weight, inputs, upstream = normal(6, 16), normal(7, 16, seed=1), normal(7, 6, seed=2)
    plain, layer = layer_of(weight, TENSOR), hgf(weight)
    assert torch.equal(layer(inputs), plain(inputs))
    ours = gradients(layer, inputs, upstream)
    for name, gradient in gradients(plain, inputs, upstream).items():
        assert torch.equal(ours[name], gradient)
    right = layer.own("side_right").detach().float().double()
    assert torch.allclose(ours["side_left"], 0.1 * upstream.T @ (inputs @ right.T), rtol=1e-6)
    assert not ours["side_right"].any()


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize("kept", ["float16", "float32"])
def test_hgf_as_it_is_stored(gate: str, kept: str) -> None:
    layer, inputs = hgf(normal(24, 32), gate=gate, factor_dtype=kept), normal(7, 32, seed=1)
    layer.own("side_left").data.normal_(generator=torch.Generator().manual_seed(3))
    code = layer.code()
    assert isinstance(code, Sum)
    assert isinstance(code.terms[1], LowRank)
    stored = inputs @ code.decode().double().T
    assert torch.allclose(stored, layer.eval()(inputs), rtol=0, atol=2e-6)
    assert code.nbytes - code.terms[0].nbytes == (2 if kept == "float16" else 4) * 2 * (24 + 32)


def test_hgf_takes_an_eighth_of_two_bits() -> None:
    """16 r (n + d) / (2 n d) at r = d / 128 and n = d: 12.5 %."""
    layer = layer_of(normal(256, 256, dtype=torch.float32), TENSOR, side={"kind": "hgf"})
    code = layer.code()
    assert isinstance(code, Sum)
    assert code.terms[1].nbytes / (2 * 256 * 256 / 8) == pytest.approx(0.125)


def test_hgf_gate_rises_and_freezes() -> None:
    layer = hgf(normal(6, 16), warmup=0.2, freeze=0.5)
    layer.own("side_left").data.fill_(1.0)
    sizes = []
    for step in (0, 10, 20, 30):
        layer.set_clock(Clock(step, 100))
        sizes.append(float(layer.choices.side.factors(layer)[0][0, 0].detach()))  # type: ignore[attr-defined]
    assert sizes == pytest.approx([0, 0.05, 0.1, 0.1], rel=1e-6)
    recipe = train_recipe({"forward": TENSOR, "side": {"kind": "hgf"}})
    optimiser = make_optimiser(layer, recipe)
    for step in (49, 50):
        layer.set_clock(Clock(step, 100))
        before = layer.own("side_gate").detach().clone()
        set_rates(optimiser, recipe, step, 100)
        layer(normal(7, 16)).square().sum().backward()
        state = {key: value.clone() for key, value in optimiser.state[layer.own("side_gate")].items()}
        optimiser.step()
        optimiser.zero_grad()
        assert torch.equal(before, layer.own("side_gate")) == (step == 50)
    assert all(torch.equal(state[key], value) for key, value in optimiser.state[layer.own("side_gate")].items())


def test_hgf_from_the_rounding_error() -> None:
    """What is left is the tail of the singular values; of full rank nothing is."""
    weight = normal(6, 16)
    sizes = torch.linalg.svdvals(weight - layer_of(weight, TENSOR).rounded().value)
    for rank in (1, 3, 6):
        layer = hgf(weight, rank=rank, start="svd")
        left, right = (factor.detach() for factor in layer.choices.side.factors(layer))  # type: ignore[attr-defined]
        left_over = weight - layer.rounded().value - left @ right
        assert float(left_over.square().sum()) == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-5, abs=1e-10)


def test_hgf_finds_a_planted_matrix() -> None:
    """y = (T + U V^T) x, the base frozen at T: rank 2 reaches it, rank 1 leaves the smaller singular value squared."""
    trits = normal(8, 12).sign() * (normal(8, 12, seed=1).abs() > 0.7)
    outer, _ = torch.linalg.qr(normal(8, 2, seed=2))
    inner, _ = torch.linalg.qr(normal(12, 2, seed=3))
    sizes = torch.tensor([2.0, 1.0], dtype=torch.float64)
    planted = (outer * sizes) @ inner.T
    for rank, left_over in ((2, 0.0), (1, 1.0)):
        layer = hgf(trits / trits.abs().mean() * 0.5, rank=rank)
        layer.weight.requires_grad_(False)
        base = layer.rounded().value
        optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        for step in range(500):
            optimiser.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 500))
            optimiser.zero_grad()
            left, right = layer.choices.side.factors(layer)  # type: ignore[attr-defined]
            loss = (planted - left @ right).square().sum()  # the expected loss of white inputs
            loss.backward()
            optimiser.step()
        assert float(loss.detach()) == pytest.approx(left_over, abs=1e-3)
        assert float(((base + planted) - base).square().sum()) == pytest.approx(5.0)


def test_hgf_of_full_rank_without_a_base_is_linear() -> None:
    layer, inputs = hgf(torch.zeros(4, 4, dtype=torch.float64), rank=4, gate="tanh"), normal(3, 4)
    layer.own("side_left").data.copy_(normal(4, 4, seed=1))
    layer.own("side_gate").data.fill_(20.0)  # tanh of it is 1
    left, right = layer.own("side_left").detach().float(), layer.own("side_right").detach().float()
    assert torch.allclose(layer(inputs), inputs @ (left.double() @ right.double()).T, rtol=1e-6, atol=1e-4)


# Schedules -----------------------------------------------------------------------------------------------------------


def rates(kind: str, **settings: Any) -> Any:
    schedule = choice_on("schedule", {"kind": kind, "learning_rate": 1.0, "warmup": 0.1, **settings})
    return lambda step: schedule.at(step, 120)


def test_trilm_drops_twice() -> None:
    """lr at the beginning, at the end of the rise, about half, at the end; weight decay until two thirds."""
    at = rates("trilm", second=0.6, weight_decay=0.1)
    assert [at(step).learning_rate for step in (0, 11, 12)] == pytest.approx([1 / 12, 1, 1])
    line = lambda step: 1 - (step - 12) / 107  # noqa: E731
    assert at(59).learning_rate == pytest.approx(line(59))
    assert at(60).learning_rate == pytest.approx(0.6 * line(60))
    assert at(119).learning_rate == 0
    assert [at(step).weight_decay for step in (0, 79, 80, 119)] == [0.1, 0.1, 0, 0]


def test_other_schedules() -> None:
    cosine, line, level = (
        rates("cosine", final=0.2),
        rates("linear", final=0.2),
        rates("warmup-stable-decay", decay=0.5),
    )
    assert [f(119).learning_rate for f in (cosine, line, level)] == pytest.approx([0.2, 0.2, 0.1])
    assert cosine(12 + 107 // 2).learning_rate == pytest.approx(0.6, abs=0.01)
    assert [level(step).learning_rate for step in (12, 60)] == [1, 1]
    assert level(119 - 27).learning_rate == pytest.approx(0.55, abs=0.02)
    assert [f(5).learning_rate for f in (cosine, line, level)] == pytest.approx([0.5] * 3)


def test_a_drop_of_the_rate_settles_codes() -> None:
    """Ternary regression with a ternary teacher: fewer codes flip behind the drop, and the loss is lower (3 seeds)."""
    ends: dict[str, list[float]] = {"trilm": [], "constant": []}
    for seed in range(3):
        teacher = normal(4, 32, seed=seed).sign() * (normal(4, 32, seed=seed + 50).abs() > 0.6)
        data, noise = normal(240, 24, 32, seed=seed + 100), 2 * normal(240, 24, 4, seed=seed + 200)
        for name, found in ends.items():
            model = nn.Sequential(nn.Linear(32, 4, bias=False, dtype=torch.float64))
            with torch.no_grad():
                model[0].weight.copy_(normal(4, 32, seed=seed + 9) * 0.5)
            schedule = {"kind": "trilm", "learning_rate": 0.05, "warmup": 0.05, "weight_decay": 0.0, "second": 0.4}
            if name == "constant":
                schedule = {"kind": "linear", "learning_rate": 0.05, "warmup": 0.05, "weight_decay": 0.0, "final": 1.0}
            recipe = train_recipe({"forward": TENSOR, "schedule": schedule})
            prepare(model, recipe)
            optimiser, digits, flips = make_optimiser(model, recipe), model[0].rounded().digits, []
            for step in range(240):
                set_clock(model, step, 240)
                set_rates(optimiser, recipe, step, 240)
                optimiser.zero_grad()
                (model(data[step]) - data[step] @ teacher.T - noise[step]).square().mean().backward()
                optimiser.step()
                now = model[0].rounded().digits
                flips.append(float((now != digits).double().mean()))
                digits = now
            if name == "trilm":
                assert sum(flips[120:160]) < 0.8 * sum(flips[80:120])
            found.append(float((model[0].rounded().value - teacher).square().mean()))
    assert sum(ends["trilm"]) < sum(ends["constant"])


def test_groups_of_parameters() -> None:
    """Matrices decay; biases and what choices own do not; gates have a rate of their own."""
    layer = hgf(normal(6, 16), rate=3.0)
    named = {id(p): name for name, p in layer.named_parameters()}
    groups = {
        tuple(sorted(named[id(p)] for p in g["params"])): (g["rate_factor"], g["decays"])
        for g in parameter_groups(layer)
    }
    assert groups == {("weight",): (1.0, True), ("side_left", "side_right"): (1.0, False), ("side_gate",): (3.0, False)}
