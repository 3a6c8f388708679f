"""ShiftAddLLM's fit: monotone rounds, known Gaussian figures, brute force, planted planes, powers of two, sharing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from featherweight.methods.quantize.grids.binary_planes import BinaryPlaneGrid, greedy
from featherweight.methods.quantize.sweep import SweepSettings, sweep
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms, values_of_shifts


def exact(**settings: object) -> BinaryPlaneGrid:
    return BinaryPlaneGrid(**{"scale_dtype": "float32", "group_size": 1 << 20, **settings})  # type: ignore[arg-type]


def squared_error(grid: BinaryPlaneGrid, weight: Tensor) -> Tensor:
    """Of every row, relative."""
    return ((grid.quantize(weight).decode().double() - weight) ** 2).sum(1) / weight.double().square().sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_do_not_rise_over_rounds_with_free_scales(bits: int) -> None:
    weight = torch.randn(10, 400, generator=torch.Generator().manual_seed(bits))
    errors = [squared_error(exact(bits=bits, rounds=rounds, keep="last"), weight) for rounds in range(12)]
    for earlier, later in zip(errors, errors[1:], strict=False):
        assert torch.all(later <= earlier + 1e-7)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [(0, (0.367, 0.120, 0.038, 0.011)), (1, (0.407, 0.121, 0.0448, 0.0235)), (3, (0.367, 0.120, 0.0381, 0.0123))],
)
def test_gaussian_figures_of_4096_weights(terms: int, expected: tuple[float, ...]) -> None:
    weight = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0))
    for bits, figure in enumerate(expected, start=1):
        error = float(squared_error(exact(bits=bits, terms=terms), weight).mean())
        assert 0.9 * figure <= error <= 1.05 * figure, bits  # least squares are exact here, and the best round is kept


def test_three_terms_are_nearly_free_and_one_is_not() -> None:
    weight = torch.randn(20, 1024, generator=torch.Generator().manual_seed(1))
    free, three, one = (float(squared_error(exact(bits=4, terms=t), weight).mean()) for t in (0, 3, 1))
    assert free < three < 1.15 * free
    assert one > 1.5 * three


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-30, 2.0**30), st.integers(1, 3))
def test_powers_of_two_miss_a_scale_by_little(value: float, terms: int) -> None:
    found = float(values_of_shifts(power_of_two_terms(torch.tensor([value], dtype=torch.float64), terms)))
    assert abs(found - value) <= (2**0.5 - 1) ** terms * value * (1 + 1e-6)


def test_the_bound_of_one_term_is_tight_just_above_the_square_root_of_two() -> None:
    above, below = (
        float(values_of_shifts(power_of_two_terms(torch.tensor([2**0.5 * f], dtype=torch.float64), 1)))
        for f in (1.0001, 0.9999)
    )
    assert (above, below) == (2.0, 1.0)
    bound = 2**0.5 - 1
    assert above / (2**0.5 * 1.0001) - 1 == pytest.approx(bound, abs=1e-3)


def test_assignment_is_the_nearest_of_all_sign_patterns_also_with_equal_scales() -> None:
    grid = exact(bits=3, group_size=50)
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(4))
    weight[:, :8] = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 2.0])  # ties of the scales below
    fit = {"scales": torch.tensor([[[1.0, 1.0, 0.5]], [[2.0, 0.0, 0.0]], [[1.5, 1.0, 0.5]]])}
    decoded = grid.nearest(weight, fit).decode()
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    sums = torch.einsum("rk,pk->rp", fit["scales"][:, 0], patterns)
    distances = (weight.unsqueeze(-1) - sums.unsqueeze(1)).abs()
    assert torch.allclose((weight - decoded).abs(), distances.amin(-1), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planted_planes_of_powers_of_two_are_recovered(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    signs = torch.randint(0, 2, (bits, 6, 8192), generator=generator).float() * 2 - 1
    scales = 2.0 ** (-2.0 * torch.arange(bits)) * 0.5
    weight = torch.einsum("k,kri->ri", scales, signs)
    for terms in (0, 1, 3):
        assert torch.allclose(exact(bits=bits, terms=terms).quantize(weight).decode(), weight, atol=1e-7)


def test_greedy_start_counts_zero_as_positive_and_leaves_padding_out() -> None:
    values = torch.tensor([[0.0, 2.0, -4.0, 9.0]], dtype=torch.float64)
    counted = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    scales, gram, right = greedy(values * counted, counted, 2)
    assert scales.tolist()[0] == pytest.approx([2.0, 4 / 3])  # mean of 0, 2, 4; the rest is -2, 0, -2
    assert gram.diagonal(dim1=1, dim2=2).tolist() == [[3.0, 3.0]]
    assert right[0, 0].item() == 6.0


def test_best_round_is_never_worse_than_the_last() -> None:
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(5))
    last, best = (squared_error(exact(bits=3, terms=3, keep=keep), weight) for keep in ("last", "best"))
    assert torch.all(best <= last + 1e-7)
    assert bool((best < last - 1e-5).any())  # powers of two do make rounds worse


def test_all_rows_of_a_column_share_their_scales() -> None:
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(6))
    code = BinaryPlaneGrid(bits=2, group_size=1, rows_per_scale="all", terms=3).quantize(weight)
    assert isinstance(code, BinaryPlanes)
    assert code.shifts is not None
    assert code.shifts.shape == (1, 6, 2, 3)
    assert code.rows_per_scale is None
    by_row = exact(bits=2, terms=3).quantize(weight.T.contiguous())  # the same fit, with rows for columns
    assert torch.equal(code.decode(), by_row.decode().T)


def test_strips_share_one_set_of_scales_in_eight_columns() -> None:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(7))
    code = BinaryPlaneGrid(bits=2, group_size=8, strips=8, terms=3).quantize(weight)
    assert isinstance(code, BinaryPlanes)
    assert code.shifts is not None
    assert code.shifts.shape == (8, 2, 2, 3)
    assert code.bits_per_weight == 2 + 8 * 3 * 2 / 32  # int8 shifts, three a scale, two scales for 32 weights
    block = exact(bits=2, terms=3).quantize(weight[4:8, 8:].reshape(1, -1))
    assert torch.allclose(code.decode()[4:8, 8:].reshape(1, -1), block.decode())


def test_dead_columns_and_weights_out_of_reach() -> None:
    weight = torch.randn(16, 4)
    weight[:, 2] = 0
    grid = BinaryPlaneGrid(bits=3, group_size=1, rows_per_scale="all", terms=3)
    assert torch.equal(grid.quantize(weight).decode()[:, 2], torch.zeros(16))
    with pytest.raises(ValueError, match="exponent_bias"):
        grid.quantize(weight * 1e-25)
    moved = grid.model_copy(update={"exponent_bias": 140}).quantize(weight * 1e-25).decode() * 1e25
    assert (moved - weight).norm() < 0.25 * weight.norm()


def test_two_rules_for_sharing_are_refused() -> None:
    with pytest.raises(ValidationError, match="set one of them"):
        BinaryPlaneGrid(strips=8, rows_per_scale="all")
    with pytest.raises(ValidationError, match="at least 1"):
        BinaryPlaneGrid(rows_per_scale=0)


@pytest.mark.parametrize("sharing", [{"group_size": 1, "rows_per_scale": "all"}, {"group_size": 8, "strips": 4}])
def test_a_sweep_with_a_diagonal_second_moment_is_the_plain_fit(sharing: dict[str, object]) -> None:
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(8))
    grid = BinaryPlaneGrid(**{"bits": 2, "terms": 3, **sharing})  # type: ignore[arg-type]
    gram = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(9)) + 0.5)
    swept = sweep(weight, {"gram": gram}, grid).code
    assert torch.allclose(swept.decode(), grid.quantize(weight).decode(), atol=1e-6)


@pytest.mark.parametrize("sharing", [{"group_size": 1, "rows_per_scale": "all"}, {"group_size": 8, "strips": 4}])
def test_compensation_lowers_the_output_error(sharing: dict[str, object]) -> None:
    grid = BinaryPlaneGrid(**{"bits": 2, "terms": 3, "rounds": 20, **sharing})  # type: ignore[arg-type]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(32, 64, generator=generator)
        mixing = torch.randn(64, 64, generator=generator) / 8 + 0.7 * torch.eye(64)
        gram = mixing.T @ mixing

        def loss(decoded: Tensor, weight: Tensor = weight, gram: Tensor = gram) -> float:
            return float((((weight - decoded) @ gram) * (weight - decoded)).sum())

        swept = sweep(weight, {"gram": gram}, grid, SweepSettings(order="group-aware")).code
        assert loss(swept.decode()) < 0.9 * loss(grid.quantize(weight).decode())
