"""Inputs of OFQ: levels, gradients, first scales, biases, and the shapes of all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from low_bit import layer_of, normal
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.quantize.choosing import choice_on
from featherweight.methods.train.activations.lsq import AFTER, BEFORE, SCALES
from featherweight.methods.train.inputs import RoundedInput


def rounding(name: str = "fc1", **settings: Any) -> RoundedInput:
    return RoundedInput(choice_on("activation", {"kind": "lsq", **settings}), name, torch.device("cpu"))


def ready(inputs: Tensor, scales: Tensor, name: str = "fc1", **settings: Any) -> RoundedInput:
    """One that has begun, with these scales."""
    found = rounding(name, **settings)
    found(inputs)
    assert found.own(SCALES).shape == scales.shape
    found.own(SCALES).data = scales
    return found


@pytest.mark.parametrize(
    ("name", "bits", "levels"),
    [
        ("a.fc1", 2, [-2, -1, 0, 1]),
        ("a.fc2", 2, [0, 1, 2, 3]),
        ("encoder.layer.3.output.dense", 2, [0, 1, 2, 3]),
        ("encoder.layer.3.attention.output.dense", 2, [-2, -1, 0, 1]),
        ("a.operands.probabilities", 3, list(range(8))),
        ("a.fc1", 1, [-1, 1]),
        ("a.fc2", 1, [0, 1]),
    ],
)
def test_levels(name: str, bits: int, levels: list[int]) -> None:
    inputs = 3 * normal(2, 5, 40)
    found = ready(inputs, torch.ones(5, dtype=torch.float64), name, bits=bits)
    assert found(inputs).detach().unique().tolist() == levels


def test_first_scales() -> None:
    inputs = normal(4, 5, 6)
    over = {"position": (0, 2), "channel": (0, 1), "tensor": (0, 1, 2)}
    for name, factor in (("fc1", 2 / math.sqrt(3)), ("fc2", 4 / math.sqrt(7))):
        for scale, axes in over.items():
            found = rounding(name, bits=3, scale=scale)
            found(inputs)
            wanted = factor * inputs.abs().mean(axes).flatten()
            assert torch.allclose(found.own(SCALES).double(), wanted, rtol=1e-6)
            assert found.own(BEFORE).shape == (6,)
    values = rounding("operands.value")
    values(inputs)
    assert values.own(SCALES).shape == (6,)
    matrix = rounding()
    matrix(normal(4, 6))
    assert matrix.own(SCALES).shape == (1,)
    by_head = rounding("operands.probabilities")
    by_head(normal(4, 3, 5, 7).softmax(-1))
    assert by_head.own(SCALES).shape == (5,)


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_gradients_against_central_differences(name: str) -> None:
    """Of scales, with the rounding's residual held fixed; of biases and inputs in closed form."""
    inputs, upstream = normal(3, 4, 6).requires_grad_(), normal(3, 4, 6, seed=1)
    scales = torch.tensor([0.3, 0.5, 0.8, 2.0], dtype=torch.float64)
    found = ready(inputs, scales, name)
    found.own(BEFORE).data = 0.1 * normal(6, seed=2)
    found.own(AFTER).data = normal(6, seed=3)
    (found(inputs) * upstream).sum().backward()
    low, high = (0, 3) if name == "fc2" else (-2, 1)
    moved = inputs.detach() + found.own(BEFORE).detach()
    residual = (moved / scales[:, None]).clamp(low, high).round() - (moved / scales[:, None]).clamp(low, high)

    def output(held: Tensor) -> float:
        return float((held[:, None] * ((moved / held[:, None]).clamp(low, high) + residual) * upstream).sum())

    for place in range(4):
        change = torch.zeros(4, dtype=torch.float64)
        change[place] = 1e-6
        difference = (output(scales + change) - output(scales - change)) / 2e-6
        assert float(found.own(SCALES).grad[place]) == pytest.approx(difference / math.sqrt(3 * 6 * high), rel=1e-6)
    position = moved / scales[:, None]
    passed = upstream * ((position >= low) & (position <= high))
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, passed)
    assert torch.allclose(found.own(BEFORE).grad, passed.sum((0, 1)), rtol=1e-12)
    assert torch.allclose(found.own(AFTER).grad, upstream.sum((0, 1)), rtol=1e-12)


def test_scales_stay_positive_and_other_lengths_are_refused() -> None:
    inputs = normal(3, 4, 6)
    found = rounding()
    found(inputs)
    found.own(SCALES).data.fill_(-1.0)
    assert bool(torch.isfinite(found(inputs)).all())
    assert bool((found.own(SCALES) > 0).all())
    with pytest.raises(FeatherError, match=r"fc1 has .* for 4 positions of its input, and gets 5: .*scale=tensor"):
        found(normal(3, 5, 6))
    chances = rounding("operands.probabilities")
    chances(normal(2, 3, 4, 4).softmax(-1))
    with pytest.raises(FeatherError, match="for 4 channels of its input, and gets 9"):
        chances(normal(2, 3, 4, 9).softmax(-1))
    anything = rounding(scale="tensor", biases=False)
    assert anything(normal(2, 3, 4)).shape == (2, 3, 4)
    assert anything(normal(2, 9, 5)).shape == (2, 9, 5)


def test_a_layer_begins_once_and_its_state_brings_shapes() -> None:
    one, two = (layer_of(normal(5, 6), {"kind": "statsq"}, activation={"kind": "lsq"}) for _ in range(2))
    inputs = normal(3, 4, 6)
    first = one(inputs)
    assert torch.equal(one(inputs), first)
    two.load_state_dict(one.state_dict())
    assert two.own(SCALES).shape == (4,)
    assert torch.equal(two(inputs), first)
    two(100 * inputs)
    assert torch.equal(two.own(SCALES), one.own(SCALES))
