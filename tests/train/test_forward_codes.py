"""Forward codes against closed forms, golden values and brute force; and each against the code that it stores."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from low_bit import forward_of, golden, normal, relative_error, uniform

from featherweight.errors import RecipeError
from featherweight.registry import registered
from featherweight.storage.codes import code_from

FORWARDS: list[dict[str, Any]] = [
    *({"kind": "absmean", "scope": scope} for scope in ("tensor", "row", "group")),
    *({"kind": "absmean", "scope": "shard", "shards": 2, "shard_along": side} for side in ("output", "input")),
    {"kind": "absmean", "scope": "group", "ties": "kept", "factor": 4 / 3},
    *({"kind": "twn", "scope": scope} for scope in ("tensor", "group")),
    *({"kind": "elastic", "bits": bits, "scope": scope} for bits in (None, 2, 4) for scope in ("tensor", "group")),
    {"kind": "elastic", "scope": "shard", "shards": 2},
    *({"kind": "statsq", "bits": bits} for bits in (1, 2, 3, 4, 8)),
    *({"kind": "uniform", "bits": bits, "scope": "group"} for bits in (2, 3, 8)),
    {"kind": "uniform", "scope": "shard", "shards": 4},
    {"kind": "sherry"},
    {"kind": "sherry", "lane_stride": 16, "group_size": 256},
    {"kind": "binary"},
    {"kind": "binary", "centred": True, "scope": "group"},
]
EXACT = {"scale_dtype": "float32"}
"""Scales of 24 bits, for golden values."""


def test_every_forward_code_is_here() -> None:
    assert {one["kind"] for one in FORWARDS} == set(registered("forward")) - {"full"}


@pytest.mark.parametrize("settings", FORWARDS, ids=str)
@pytest.mark.parametrize("size", [1.0, 0.02, 1e-3])
def test_what_is_trained_is_what_is_stored(settings: dict[str, Any], size: float) -> None:
    """Bit for bit, in float64 and in float32, whatever the size of the weights; through spec and tensors."""
    forward = forward_of(**settings)
    for dtype, shape in ((torch.float64, (12, 256)), (torch.float32, (8, 320))):
        if shape[1] == 320 and settings["kind"] == "sherry":
            shape = (8, 512)
        weight = (size * normal(*shape)).to(dtype)
        found, code = forward.rounded(weight), forward.code(weight)
        again = code_from(code.spec, code.tensors())
        assert torch.equal(again.decode().to(dtype), found.value)
        assert found.value.dtype == dtype
        assert found.scales.shape[0] == shape[0]


@pytest.mark.parametrize("settings", FORWARDS, ids=str)
def test_zeros_and_ties_are_finite(settings: dict[str, Any]) -> None:
    forward = forward_of(**settings)
    for weight in (torch.zeros(4, 256), torch.ones(4, 256), -torch.ones(4, 256)):
        value = forward.rounded(weight).value
        assert bool(value.isfinite().all())
        assert torch.equal(forward.code(weight).decode(), value)
        if not weight.any():
            assert float(value.abs().max()) < 1e-4


def test_absmean_of_known_distributions() -> None:
    forward = forward_of("absmean", scope="tensor")
    flat = forward.rounded(uniform(200, 500))
    assert float(flat.scales[0, 0]) == pytest.approx(0.5, abs=0.005)
    for digit, share in ((-1, 0.375), (0, 0.25), (1, 0.375)):
        assert float((flat.digits == digit).double().mean()) == pytest.approx(share, abs=0.01)
    weight = normal(200, 500)
    bell = forward.rounded(weight)
    assert float((bell.digits == 0).double().mean()) == pytest.approx(0.310, abs=0.005)
    assert relative_error(weight, bell.value) == pytest.approx(0.513, abs=0.003)


def test_halves_of_a_scale() -> None:
    """BitNet rounds half to even, so that they are off; Tequila keeps them."""
    row = torch.tensor([[0.5, -0.5, 1.5, -1.5]], dtype=torch.float64)
    assert forward_of("absmean", scope="row").rounded(row).digits.tolist() == [[0, 0, 1, -1]]
    kept = forward_of("absmean", scope="group", group_size=4, ties="kept").rounded(row)
    assert kept.digits.tolist() == [[1, -1, 1, -1]]
    assert kept.scales.tolist() == [[1.0]]


def test_requantising_shrinks_the_scale_and_keeps_the_trits() -> None:
    forward = forward_of("absmean", scope="tensor", **EXACT)
    found = forward.rounded(normal(20, 64))
    again = forward.rounded(found.value)
    nonzero = float((found.digits != 0).double().mean())
    assert torch.equal(again.digits, found.digits)
    assert float(again.scales[0, 0]) == pytest.approx(nonzero * float(found.scales[0, 0]), rel=1e-6)


@pytest.mark.parametrize("along", ["output", "input"])
def test_shards_are_quantised_by_themselves(along: str) -> None:
    weight = normal(8, 32)
    weight[:4] *= 3
    weight[:, :16] *= 2
    sharded = forward_of("absmean", scope="shard", shards=2, shard_along=along).rounded(weight).value
    whole = forward_of("absmean", scope="tensor")
    dim = 0 if along == "output" else 1
    parts = torch.cat([whole.rounded(part).value for part in weight.chunk(2, dim)], dim)
    assert torch.equal(sharded, parts)
    assert not torch.equal(sharded, whole.rounded(weight).value)
    with pytest.raises(RecipeError, match="3 shards do not divide"):
        forward_of("absmean", scope="shard", shards=3, shard_along=along).check_shape((8, 32), "q_proj")


def test_bytes_of_a_scale_for_a_matrix_are_counted() -> None:
    """A trit in 1.6 bits, and 16 bits a row, whether the scale is of a row, a shard or the matrix."""
    weight = normal(40, 100)
    sizes = {scope: forward_of("absmean", scope=scope).code(weight).nbytes for scope in ("tensor", "row", "shard")}
    assert set(sizes.values()) == {40 * 100 // 5 + 2 * 40}


def test_thirds_and_golden_values_of_four_thirds() -> None:
    forward = forward_of("absmean", scope="row", factor=4 / 3, **EXACT)
    digits = forward.rounded(uniform(50, 2000)).digits
    for digit in (-1, 0, 1):
        assert float((digits == digit).double().mean()) == pytest.approx(1 / 3, abs=0.01)
    weight = normal(50, 2000)
    assert relative_error(weight, forward.rounded(weight).value) == pytest.approx(0.445, abs=0.003)
    for count, expected in ((16, 0.37699973), (128, 0.37340055)):
        assert relative_error(golden(count), forward.rounded(golden(count)).value) == pytest.approx(expected, abs=2e-7)


def test_scaled_rows_have_the_same_codes() -> None:
    weight, factors = normal(6, 64), torch.tensor([0.25, 0.5, 1, 2, 4, 8], dtype=torch.float64).unsqueeze(1)
    for settings in ({"kind": "absmean", "factor": 4 / 3}, {"kind": "statsq"}, {"kind": "binary"}, {"kind": "twn"}):
        forward = forward_of(**settings, **EXACT)
        one, other = forward.rounded(weight), forward.rounded(weight * factors)
        assert torch.equal(one.digits, other.digits)
        assert torch.allclose(other.value, one.value * factors, rtol=1e-6, atol=0)
    per_tensor = forward_of("absmean", scope="tensor")
    assert not torch.equal(per_tensor.rounded(weight).digits, per_tensor.rounded(weight * factors).digits)


def test_twn_of_a_normal_distribution() -> None:
    weight = normal(50, 2000)
    assert relative_error(weight, forward_of("twn", scope="group").rounded(weight).value) == pytest.approx(
        0.434, abs=0.004
    )


@pytest.mark.parametrize("centred", [False, True])
def test_the_binary_scale_is_the_best(centred: bool) -> None:
    weight = normal(3, 200) + 0.4
    found = forward_of("binary", centred=centred, **EXACT).rounded(weight)
    target = weight - weight.mean(1, keepdim=True) if centred else weight
    best = (target - found.value).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert best < (target - factor * found.value).square().sum()
    balance = float((found.digits > 0).double().mean())
    assert (abs(balance - 0.5) < 0.08) == centred


def test_no_weight_is_off_where_nothing_may_be() -> None:
    weight = normal(4, 64)
    weight[0, :8] = 0
    for settings in ({"kind": "binary"}, {"kind": "statsq", "bits": 2}, {"kind": "statsq", "bits": 1}):
        assert bool((forward_of(**settings).rounded(weight).value != 0).all())


def test_statsq_has_flat_histograms_for_uniform_weights() -> None:
    for bits in (2, 3):
        counts = forward_of("statsq", bits=bits).rounded(uniform(20, 5000)).digits.unique(return_counts=True)[1]
        assert torch.allclose(counts / 100_000, torch.full((2**bits,), 2.0**-bits), atol=0.01)
    counts = forward_of("statsq").rounded(normal(20, 5000)).digits.unique(return_counts=True)[1]
    assert torch.allclose(counts / 100_000, torch.tensor([0.212, 0.288, 0.288, 0.212]), atol=0.006)


def test_statsq_levels_and_errors() -> None:
    weight = normal(10, 5000)
    for bits, mse in ((2, 0.138), (3, 0.071), (4, 0.049)):
        forward = forward_of("statsq", bits=bits)
        value = forward.rounded(weight).value
        assert float((value - weight).square().mean()) == pytest.approx(mse, abs=0.004)
        assert len(value[0].unique()) == 2**bits
        assert torch.equal(forward.rounded(-weight).value, -value)


def test_sherry_is_the_best_of_all_patterns() -> None:
    """Two quartets, one scale: every place of the zeros and every sign, each with its best scale."""
    forward = forward_of("sherry", group_size=8, **EXACT)
    for seed in range(5):
        weight = normal(1, 8, seed=seed)
        best = float("inf")
        for zeros in itertools.product(range(4), repeat=2):
            for signs in itertools.product((-1.0, 1.0), repeat=6):
                trits = torch.zeros(8, dtype=torch.float64)
                places = [i for i in range(8) if i not in (zeros[0], 4 + zeros[1])]
                trits[places] = torch.tensor(signs, dtype=torch.float64)
                scale = max(0.0, float(weight[0] @ trits) / 6)
                best = min(best, float((weight[0] - scale * trits).square().sum()))
        assert float((weight - forward.rounded(weight).value).square().sum()) == pytest.approx(best, rel=1e-6)


def test_sherry_golden_values() -> None:
    for count, alpha, error in ((16, 0.66828141, 0.44882102), (128, 0.80746413, 0.46421981)):
        found = forward_of("sherry", group_size=count, **EXACT).rounded(golden(count))
        assert float(found.scales[0, 0]) == pytest.approx(alpha, abs=1e-7)
        assert relative_error(golden(count), found.value) == pytest.approx(error, abs=2e-7)


def test_errors_of_a_normal_distribution_in_groups_of_128() -> None:
    weight = normal(100, 1280)
    for settings, error in (({"kind": "sherry"}, 0.531), ({"kind": "absmean"}, 0.511), ({"kind": "binary"}, 0.601)):
        value = forward_of(**settings, scope="group").rounded(weight).value
        assert relative_error(weight, value) == pytest.approx(error, abs=0.002)


@pytest.mark.parametrize("lane_stride", [1, 16])
def test_every_quartet_has_one_zero(lane_stride: int) -> None:
    forward = forward_of("sherry", lane_stride=lane_stride, group_size=256)
    for weight in (torch.zeros(2, 256), torch.ones(2, 256), normal(2, 256)):
        trits = forward.rounded(weight).digits
        lanes = trits.view(2, -1, 4, lane_stride) if lane_stride > 1 else trits.view(2, -1, 4, 1)
        assert bool(((lanes == 0).sum(2) == 1).all())


def test_sherry_refuses_widths_without_quartets() -> None:
    with pytest.raises(RecipeError, match=r"up_proj has 30 columns .* multiples of 4"):
        forward_of("sherry").check_shape((8, 30), "up_proj")


def test_uniform_reaches_its_largest_weight() -> None:
    weight = normal(4, 64)
    for bits in (3, 8):
        found = forward_of("uniform", bits=bits, **EXACT).rounded(weight)
        assert float(found.digits.abs().max()) == 2 ** (bits - 1) - 1
        assert bool(((weight - found.value).abs() <= 0.5001 * found.scales).all())
