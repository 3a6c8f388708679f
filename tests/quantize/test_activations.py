"""Integer inputs: FlexQ's activation quantiser, the code that states it, the layer that applies it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.transforms.quantize_inputs import QuantizeInputs
from featherweight.methods.recipe import load_recipe
from featherweight.model.layers.activations import (
    affine_inputs,
    dequantize_inputs,
    input_bits,
    input_range,
    omse_input_range,
    quantize_inputs,
    quantized_inputs,
)
from featherweight.model.layers.modules import FeatherConv1D, FeatherLinear
from featherweight.native.bit_planes import grouped_product
from featherweight.storage.codes import code_from, code_layout
from featherweight.storage.codes.quantized_input import QuantizedInput


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4, 1e9])
def test_idempotent_odd_and_within_half_a_step(bits: int, scale: float) -> None:
    inputs = gaussian(20, 300) * scale
    codes, steps = quantize_inputs(inputs, bits, 128)
    values = dequantize_inputs(codes, steps, 128)
    assert codes.shape == inputs.shape
    assert steps.shape == (20, 3)
    assert torch.equal(quantized_inputs(values, bits, 128), values)
    top = 2 ** (bits - 1) - 1
    if scale <= 1e4:  # beyond, the largest step is not enough
        assert torch.equal(quantized_inputs(-inputs, bits, 128), -values)
        assert int(codes.abs().max()) <= top
        width = steps.repeat_interleave(128, 1)[:, :300]
        assert bool(((values - inputs).abs() <= width / 2 * 1.0001).all())
    if scale == 1e-9:
        assert not values.any()  # the smallest step silences tiny groups, as published


def test_relative_error_of_gaussian_groups() -> None:
    inputs = gaussian(2000, 128)
    error = (quantized_inputs(inputs, 6, 128) - inputs).norm() / inputs.norm()
    assert float(error) == pytest.approx(0.0265, abs=0.0004)


def test_groups_and_tokens_have_steps_of_their_own() -> None:
    inputs = gaussian(4, 256)
    changed = inputs.clone()
    changed[0, 200] = 100.0
    before, after = quantized_inputs(inputs, 6, 128), quantized_inputs(changed, 6, 128)
    assert torch.equal(before[1:], after[1:])
    assert torch.equal(before[0, :128], after[0, :128])
    assert not torch.equal(before[0, 128:], after[0, 128:])
    batched = quantized_inputs(inputs.view(2, 2, 256), 6, 128)
    assert torch.equal(batched.view(4, 256), before)


def test_gradients_pass_straight_through() -> None:
    inputs = gaussian(3, 16).requires_grad_()
    quantized_inputs(inputs, 6, 16).pow(2).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, 2 * quantized_inputs(inputs.detach(), 6, 16), atol=1e-6)


def test_sensitive_layers_get_more_bits() -> None:
    assert [input_bits(role) for role in ("q_proj", "o_proj", "gate_proj", "down_proj", "fc2", "fc1")] == [
        6, 6, 6, 8, 8, 6,
    ]  # fmt: skip
    transform = QuantizeInputs(bits=5, wide_bits=7, wide=("*_proj",))
    weight = gaussian(4, 8)
    made = [
        transform.for_layer(weight, {}, 0, role=role).wrap(UniformGrid().quantize(weight)) for role in ("up", "o_proj")
    ]
    assert [code.spec["bits"] for code in made] == [5, 7]


def wrapped(weight: Tensor, bits: int = 6) -> QuantizedInput:
    grid = UniformGrid(bits=6, symmetric=True, convention="flexq", group_size=32)
    return QuantizedInput(grid.quantize(weight), bits, 32)


def test_code_is_its_inner_code() -> None:
    code = wrapped(gaussian(5, 70))
    assert torch.equal(code.decode(), code.inner.decode())
    assert torch.equal(code.decode_rows(1, 3), code.inner.decode()[1:3])
    assert code.nbytes == code.inner.nbytes
    again = code_from(json.loads(json.dumps(code.spec)), code.tensors())
    assert again.spec == code.spec
    assert torch.equal(again.decode(), code.decode())
    assert set(code_layout(code.spec)) == set(code.tensors())
    for wrong in ({"bits": 1}, {"group_size": 0}, {"inner": None}):
        with pytest.raises(ValueError, match="expected"):
            code_layout({**code.spec, **wrong})


def layer_of(code: QuantizedInput, cls: type[FeatherLinear], bias: Tensor | None, dtype: torch.dtype) -> FeatherLinear:
    layer = cls(code.spec, bias=bias is not None, compute_dtype=dtype)
    state = code.tensors() if bias is None else {**code.tensors(), "bias": bias.to(dtype)}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("cls", [FeatherLinear, FeatherConv1D])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_computes_the_integer_product(cls: type[FeatherLinear], with_bias: bool) -> None:
    weight, inputs = gaussian(12, 96), gaussian(2, 7, 96, seed=1)
    bias = gaussian(12, seed=2) if with_bias else None
    code = wrapped(weight)
    layer = layer_of(code, cls, bias, torch.float32)
    codes, steps = quantize_inputs(inputs.view(14, 96), 6, 32)
    inner = code.inner
    stored, _ = inner.unpack()  # type: ignore[attr-defined]
    product = grouped_product(stored.int() - 32, inner.scales, codes, steps, 6, 6, group_size=32)  # type: ignore[attr-defined]
    expected = product if bias is None else product + bias
    found = layer(inputs)
    assert torch.allclose(found.view(14, 12), expected, rtol=1e-5, atol=1e-5 * float(product.abs().max()))
    assert not torch.allclose(found, torch.nn.functional.linear(inputs, code.decode(), bias), atol=1e-3)


def test_half_precision_layers_round_only_once() -> None:
    weight, inputs = gaussian(12, 96), gaussian(7, 96, seed=1).bfloat16()
    layer = layer_of(wrapped(weight, bits=8), FeatherLinear, None, torch.bfloat16)
    exact = quantized_inputs(inputs, 8, 32) @ wrapped(weight).decode().T
    assert torch.equal(layer(inputs), exact.bfloat16())


def test_preset_has_the_published_rule() -> None:
    recipe = load_recipe("flexq")
    transform = recipe.transforms[0]
    weight = gaussian(8, 256)
    for role, bits in (("q_proj", 6), ("down_proj", 8)):
        spec = transform.for_layer(weight, {}, 0, role=role).wrap(recipe.grid.quantize(weight)).spec
        assert (spec["kind"], spec["bits"], spec["group_size"]) == ("quantized-input", bits, 128)
        assert spec["inner"]["bits"] == 6
    code = recipe.grid.quantize(gaussian(8, 1024))
    assert code.bits_per_weight == 6.125
    assert recipe.needs == ()


def test_groups_beat_whole_tokens() -> None:
    """The card's relative check: no groups is clearly worse where channels differ in size."""
    inputs = gaussian(500, 1024) * torch.linspace(-2, 2, 1024).exp()

    def error(group: int) -> float:
        return float((quantized_inputs(inputs, 6, group) - inputs).norm() / inputs.norm())

    assert error(128) < 0.75 * error(1024)


def test_static_and_dynamic_ranges_agree_where_all_tokens_have_the_same() -> None:
    inputs = gaussian(20, 32)
    inputs[:, 0], inputs[:, 1] = -5.0, 7.0
    results = [affine_inputs(inputs, 8, *input_range(inputs, per_token)) for per_token in (False, True)]
    assert torch.equal(*results)
    assert bool(((results[0] - inputs).abs() <= 12 / 255 * 0.51).all())
    inputs[3, 1] = 70.0
    assert torch.equal(affine_inputs(inputs, 8, *input_range(inputs, True))[4:], results[1][4:])
    assert not torch.equal(affine_inputs(inputs, 8, *input_range(inputs, False))[4:], results[1][4:])


def test_static_ranges_contain_zero_and_are_shrunk_when_it_pays() -> None:
    assert float(input_range(gaussian(64, 64) + 10, per_token=False)[0]) == 0
    assert not affine_inputs(torch.zeros(2, 4), 4, *input_range(torch.zeros(2, 4), True)).any()
    inputs = gaussian(256, 64)
    whole = input_range(inputs, per_token=False)
    shrunk = omse_input_range(inputs, 3, *whole)
    assert float(shrunk[1]) < 0.9 * float(whole[1])
    errors = [float((affine_inputs(inputs, 3, *r) - inputs).norm()) for r in (whole, shrunk)]
    assert errors[1] < errors[0]
