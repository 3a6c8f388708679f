"""Layer transforms: what every one must satisfy, in float64, and what each promises of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.methods.quantize.base import LayerTransform, Transform
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.methods.quantize.transforms.hadamard import HadamardTransform, Rotation, block_for
from featherweight.methods.quantize.transforms.identity import Identity
from featherweight.methods.quantize.transforms.reorder import ReorderTransform, activation_order, similarity_order
from featherweight.registry import registered
from featherweight.storage.codes import code_from
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.orthogonal import kernel_order, largest_order

Maker = Callable[[Tensor, dict[str, Tensor]], LayerTransform]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(inputs: Tensor, full: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Everything calibration may know of inputs [t, in], their full-precision forms and a weight."""
    tokens = len(inputs)
    return {
        "gram": inputs.T @ inputs / tokens,
        "cross": (full - inputs).T @ inputs / tokens,
        "held_out_gram": full.T @ full / tokens,
        "mean": inputs.mean(0),
        "mean_abs": inputs.abs().mean(0),
        "mean_square": inputs.square().mean(0),
        "inputs": inputs,
        "tokens": torch.tensor(tokens),
        "base": weight * 0.9,
        "fisher": weight.square(),
    }


def made_by(choice: Transform, weight: Tensor, statistics: dict[str, Tensor]) -> LayerTransform:
    return choice.for_layer(weight, statistics, seed=(1 << 62) + 7)


def registered_transforms() -> dict[str, Maker]:
    """Every registered choice that works on single layers, with default settings, and the building blocks."""
    found: dict[str, Maker] = {}
    for name, cls in registered("transform").items():
        if cls.scope == "layer" and cls.for_layer is not Transform.for_layer:  # type: ignore[attr-defined]
            found[name] = functools.partial(made_by, cls())
    found["hadamard-4"] = lambda w, s: HadamardTransform(block=4).for_layer(w, s, seed=1)
    found["hadamard-whole"] = lambda w, s: HadamardTransform(block="whole").for_layer(w, s, seed=1)
    found["reorder-similarity"] = lambda w, s: ReorderTransform(by="similarity", group_size=8).for_layer(w, s, seed=1)
    found["column-scale"] = lambda w, s: ColumnScale(numbers(w.shape[1], seed=9).exp())
    return found


TRANSFORMS = registered_transforms()
WIDTHS = [1, 7, 12, 40, 96, 128, 200, 256]


@pytest.fixture(params=sorted(TRANSFORMS))
def maker(request: pytest.FixtureRequest) -> Maker:
    return TRANSFORMS[request.param]


def setting(columns: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weight, inputs = numbers(10, columns, seed=1), numbers(50, columns, seed=2) * numbers(columns, seed=3).exp()
    return weight, inputs, statistics_of(inputs, inputs + 0.1 * numbers(50, columns, seed=4), weight)


# What every layer transform must satisfy ---------------------------------------------------------------------------


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_function_is_preserved(maker: Maker, columns: int) -> None:
    weight, inputs, statistics = setting(columns)
    transform = maker(weight, statistics)
    turned = transform.apply(weight)
    output = inputs @ weight.T
    assert torch.allclose(
        transform.inputs(inputs) @ turned.T, output, rtol=1e-12, atol=1e-12 * float(output.abs().max())
    )
    assert torch.allclose(transform.invert(turned), weight, rtol=1e-12, atol=1e-12)
    assert turned.dtype == weight.dtype
    assert transform.apply(weight.float()).dtype == torch.float32


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_wrapped_code_decodes_to_the_original_basis(maker: Maker, columns: int) -> None:
    weight, _, statistics = setting(columns)
    transform = maker(weight, statistics)
    turned = transform.apply(weight.float())
    exact = transform.wrap(Dense(turned))
    assert torch.allclose(exact.decode(), weight.float(), rtol=1e-5, atol=2e-6)
    code = UniformGrid(bits=4, group_size=32).quantize(turned)
    wrapped = transform.wrap(code)
    expected = transform.invert(code.decode().double())
    assert torch.allclose(wrapped.decode().double(), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(code_from(wrapped.spec, wrapped.tensors()).decode(), wrapped.decode())


@pytest.mark.parametrize("columns", WIDTHS)
def test_statistics_are_those_of_the_transformed_input(maker: Maker, columns: int) -> None:
    weight, inputs, statistics = setting(columns)
    transform = maker(weight, statistics)
    full = inputs + 0.1 * numbers(50, columns, seed=4)
    turned_weight = transform.apply(weight)
    expected = statistics_of(transform.inputs(inputs), transform.inputs(full), turned_weight)
    carried = transform.statistics(statistics)
    assert torch.equal(carried["gram"], carried["gram"].T)
    assert set(carried) >= set(statistics) - {"fisher"}
    for name in set(carried) - {"fisher"}:
        assert torch.allclose(carried[name], expected[name], rtol=1e-10, atol=1e-12 * float(expected[name].abs().max()))
    if "mean_abs" in carried and "inputs" not in statistics:
        pytest.fail("the sample of inputs was given")


@pytest.mark.parametrize("columns", [7, 96])
def test_second_moments_are_exactly_symmetric_whatever_the_products_left(maker: Maker, columns: int) -> None:
    weight, _, statistics = setting(columns)
    for name in ("gram", "held_out_gram"):
        statistics[name] = statistics[name] * (1 + 1e-15 * torch.arange(columns, dtype=torch.float64))
        assert not torch.equal(statistics[name], statistics[name].T)
    carried = maker(weight, statistics).statistics(statistics)
    for name in ("gram", "held_out_gram"):
        assert torch.equal(carried[name], carried[name].T)


def test_a_symmetric_moment_of_an_unchanged_input_is_not_copied() -> None:
    """Factors are kept for the very tensor they were made from."""
    gram = torch.eye(4)
    assert Identity().statistics({"gram": gram})["gram"] is gram


def test_without_statistics_nothing_is_made_up(maker: Maker) -> None:
    weight, _, statistics = setting(96)
    transform = maker(weight, {})
    assert transform.statistics({}) == {}
    assert set(maker(weight, statistics).statistics({"gram": statistics["gram"]})) == {"gram"}
    assert torch.allclose(transform.invert(transform.apply(weight)), weight, rtol=1e-12, atol=1e-12)


def test_equal_transforms_have_equal_keys(maker: Maker) -> None:
    """Layers that share an input then share what is carried over; different transforms must not."""
    weight, _, statistics = setting(96)
    keys = {name: getattr(make(weight, statistics), "key", name) for name, make in TRANSFORMS.items()}
    assert len(set(keys.values())) == len(keys)
    assert getattr(maker(weight, statistics), "key", 0) == getattr(maker(weight, statistics), "key", 0)


def test_gradients_follow_the_change_of_weights() -> None:
    """Fisher information with respect to scaled or reordered weights, by autograd; a rotation drops it."""
    weight, inputs, statistics = setting(24)
    for transform in (ColumnScale(numbers(24, seed=5).exp()), ReorderTransform().for_layer(weight, statistics, 0)):
        original = weight.clone().requires_grad_()
        (inputs @ original.T).square().sum().backward()
        turned = transform.apply(weight).clone().requires_grad_()
        (transform.inputs(inputs) @ turned.T).square().sum().backward()
        assert original.grad is not None
        assert turned.grad is not None
        carried = transform.statistics({"fisher": original.grad.square()})["fisher"]
        assert torch.allclose(carried, turned.grad.square(), rtol=1e-9)
    assert "fisher" not in Rotation(8, 0).statistics({"fisher": weight})


# Hadamard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "block", "expected"),
    [
        (256, 128, 128),
        (96, 128, 32),
        (200, 128, 8),
        (7, 128, 1),
        (4096, 64, 64),
        (576, 128, 64),
        (576, 192, 192),
        (576, 576, 576),
        (63, 9, 9),
        (96, 24, 24),
        (768, "whole", 768),
        (200, "whole", 200),
        (11008, "whole", 11008),
        (28672, "whole", 28672),
        (29568, "whole", 4224),
        (9, "whole", 9),
        (67, "whole", 1),
    ],
)
def test_blocks_for_widths(columns: int, block: int, expected: int) -> None:
    assert block_for(columns, block) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.one_of(st.integers(1, 300), st.just("whole")))
def test_the_block_always_divides(columns: int, block: int | Literal["whole"]) -> None:
    try:
        found = block_for(columns, block)
    except ValueError as error:
        assert block != "whole"
        assert columns % block or kernel_order(block) is None
        found = int(str(error).rsplit(maxsplit=1)[1])
        orders = [n for n in range(1, columns + 1) if columns % n == 0 and kernel_order(n) is not None]
        assert abs(found - block) == min(abs(n - block) for n in orders)
    assert columns % found == 0
    assert kernel_order(found) is not None
    if block == "whole":
        assert found == max(n for n in range(1, columns + 1) if columns % n == 0 and kernel_order(n) is not None)
    elif block & (block - 1) == 0:
        assert found == max(n for n in range(1, block + 1) if columns % n == 0 and n & (n - 1) == 0)


def test_an_order_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"block is 100, expected .* that divides 4096; nearest is 128$"):
        HadamardTransform(block=100).for_layer(numbers(2, 4096), {}, 0)
    assert HadamardTransform(block=96).layer_refusal(576, "q_proj") is None
    assert "nearest is 192" in str(HadamardTransform(block=200).layer_refusal(576, "q_proj"))
    assert HadamardTransform(block=200, roles=("o_proj",)).layer_refusal(576, "q_proj") is None


def test_an_odd_width_is_left_alone() -> None:
    weight = numbers(4, 7)
    transform = HadamardTransform().for_layer(weight, {}, seed=3)
    assert isinstance(transform, Identity)
    code = Dense(weight.float())
    assert transform.wrap(code) is code


def test_rotation_spreads_an_outlier_column() -> None:
    weight = numbers(64, 256)
    weight[:, 5] *= 60
    turned = HadamardTransform().for_layer(weight, {}, seed=3).apply(weight)
    columns = turned.norm(dim=0)[:128]
    assert float(columns.max() / columns.min()) < 3
    grid = UniformGrid(bits=3)
    error = grid.quantize(weight.float()).decode().double() - weight
    turned_error = grid.quantize(turned.float()).decode().double() - turned
    assert float(turned_error[:, :128].norm()) < 0.8 * float(error[:, :128].norm())


@pytest.mark.parametrize("columns", [72, 96, 288, 576, 1376, 63])
def test_one_column_is_spread_over_the_whole_width(columns: int) -> None:
    """A column of 100 times the size of others: afterwards none is far above the root mean square of all."""
    weight = numbers(32, columns)
    weight[:, columns // 3] *= 100
    turned = HadamardTransform(block="whole").for_layer(weight, {}, seed=3).apply(weight).square().mean(0).sqrt()
    assert float(weight.square().mean(0).sqrt().max() / weight.square().mean().sqrt()) > 0.8 * math.sqrt(columns)
    assert float(turned.max() / turned.square().mean().sqrt()) < 1.7
    halves = turned[: columns // 2].square().sum() / turned.square().sum()
    assert 0.35 < float(halves) < 0.65


@pytest.mark.parametrize("columns", [7, 9, 63, 99])
def test_odd_widths_are_rotated_when_asked_for(columns: int) -> None:
    weight = numbers(4, columns)
    transform = HadamardTransform(block="whole").for_layer(weight, {}, seed=3)
    assert isinstance(transform, Rotation)
    assert transform.block == largest_order(columns)
    assert torch.allclose(transform.invert(transform.apply(weight)), weight, atol=1e-12)
    assert torch.allclose(transform.apply(weight).norm(), weight.norm())


def test_seeds_of_layers_differ_and_repeat() -> None:
    weight = numbers(4, 256)
    one, same, other = (HadamardTransform().for_layer(weight, {}, seed).apply(weight) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# Column scales -------------------------------------------------------------------------------------------------------


def test_scales_are_the_reciprocals_of_what_is_stored() -> None:
    transform = ColumnScale(torch.tensor([0.3, 1.0, 7.0]))
    assert transform.inverse.dtype == torch.float16
    assert torch.equal(transform.inverse.double() * transform.scales, torch.ones(3, dtype=torch.float64))
    assert ColumnScale(torch.tensor([1e6, 1.0])).inverse.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, 1e-60])
def test_impossible_scales_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="column scales"):
        ColumnScale(torch.tensor([1.0, value], dtype=torch.float64))


# Reordering ----------------------------------------------------------------------------------------------------------


def test_activation_order_is_falling_and_stable() -> None:
    assert activation_order(torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0]))).tolist() == [1, 3, 2, 0]


def test_an_order_that_changes_nothing_is_not_stored() -> None:
    weight = numbers(4, 6)
    made = ReorderTransform().for_layer(weight, {"gram": torch.eye(6)}, 0)
    assert isinstance(made, Identity)
    assert isinstance(ReorderTransform().for_layer(weight, {}, 0), Identity)
    assert ReorderTransform().extra_bytes((4, 6)) == 12


def test_similarity_is_the_greedy_choice_of_the_paper() -> None:
    """Against a plain transcription: cos(column, mean of the remaining ones), the best make the next group."""
    weight = numbers(12, 22)
    left, expected = list(range(22)), []
    while left:
        mean = weight[:, left].mean(1)
        cosine = {j: float(weight[:, j] @ mean / weight[:, j].norm() / mean.norm()) for j in left}
        best = sorted(sorted(left, key=lambda j: -cosine[j])[:5])
        expected += best
        left = [j for j in left if j not in best]
    assert similarity_order(weight, 5).tolist() == expected


def test_similarity_gathers_shuffled_prototypes() -> None:
    """PT2-LLM test 6: columns shuffled from few prototypes, each with its own offset, quantise better in its order."""
    prototypes = torch.cat([numbers(64, 1, seed=k) + offset for k, offset in enumerate((4.0, -4.0, 1.0, 0.0))], 1)
    weight = prototypes.repeat(1, 32) + 0.1 * numbers(64, 128, seed=9)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    weight = weight[:, order].float()
    grid, made = UniformGrid(bits=2, group_size=32), ReorderTransform(by="similarity", group_size=32)
    transform = made.for_layer(weight, {}, 0)
    plain = (grid.quantize(weight).decode() - weight).norm()
    sorted_error = (transform.wrap(grid.quantize(transform.apply(weight))).decode() - weight).norm()
    assert sorted_error < 0.5 * plain


def test_columns_of_zeros_have_an_order_too() -> None:
    assert sorted(similarity_order(torch.zeros(3, 10), 4).tolist()) == list(range(10))
