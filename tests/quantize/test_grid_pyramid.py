"""Pyramid vector quantisation: counts, numbering, encoder, amplitude law, gain and sweep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.pyramid import PyramidGrid, nearest_points
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.pyramid import Pyramid
from featherweight.storage.codes.pyramid_enumeration import (
    index_bits,
    indexed_points,
    pack_indices,
    point_count,
    point_indices,
    tables,
    unpack_indices,
)
from featherweight.storage.codes.pyramid_levels import amplitude_levels, share_law


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_points(dimension: int, pulses: int) -> Tensor:
    """The pyramid by brute force, in the order 0, +1, -1, +2, ... of the coordinates, the first slowest."""
    candidates = itertools.product(range(-pulses, pulses + 1), repeat=dimension)
    points = [point for point in candidates if sum(map(abs, point)) == pulses]
    return torch.tensor(sorted(points, key=lambda point: [2 * abs(c) - (c > 0) for c in point]))


def random_points(count: int, dimension: int, pulses: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, dimension, (count, pulses), generator=generator)
    sizes = torch.zeros(count, dimension, dtype=torch.int64).scatter_add_(1, places, torch.ones_like(places))
    return sizes * (1 - 2 * torch.randint(0, 2, (count, dimension), generator=generator))


def cosines(vectors: Tensor, points: Tensor) -> Tensor:
    return (vectors * points).sum(1) / vectors.norm(dim=1) / points.double().norm(dim=1)


# --- counts and numbers ---


@pytest.mark.parametrize(("dimension", "pulses", "count"), [(2, 3, 12), (3, 2, 18), (3, 4, 66), (4, 3, 88)])
def test_counts_by_brute_force(dimension: int, pulses: int, count: int) -> None:
    assert point_count(dimension, pulses) == count == len(all_points(dimension, pulses))


@pytest.mark.parametrize(("dimension", "pulses"), [(1, 1), (1, 5), (2, 1), (2, 4), (3, 4), (4, 3), (5, 2)])
def test_numbers_are_places_in_the_order(dimension: int, pulses: int) -> None:
    points = all_points(dimension, pulses)
    numbers = point_indices(points, pulses)
    assert numbers.squeeze(1).tolist() == list(range(len(points)))
    assert torch.equal(indexed_points(numbers, dimension, pulses), points)


@pytest.mark.parametrize(
    ("dimension", "pulses", "bits"), [(16, 12, 32), (16, 27, 48), (16, 58, 64), (32, 50, 96), (128, 200, 396)]
)
def test_large_pyramids_round_trip(dimension: int, pulses: int, bits: int) -> None:
    """In 63 bits, and in several limbs beyond; with the exact number by Python's integers."""
    assert index_bits(dimension, pulses) == bits
    points = torch.cat([random_points(50, dimension, pulses), torch.zeros(1, dimension, dtype=torch.int64)])
    points[0] = torch.eye(dimension, dtype=torch.int64)[0] * -pulses  # the last number but one
    numbers = point_indices(points, pulses)
    assert torch.equal(indexed_points(numbers, dimension, pulses), points)
    limb_bits = tables(dimension, pulses).limb_bits
    packed = pack_indices(numbers, bits, limb_bits)
    assert packed.numel() == -(-51 * bits // 8)
    assert torch.equal(unpack_indices(packed, 51, bits, limb_bits), numbers)

    def value(number: Tensor) -> int:
        return sum(limb << (i * limb_bits) for i, limb in enumerate(number.tolist()))

    assert value(numbers[0]) == point_count(dimension, pulses) - 1
    assert value(numbers[-1]) == point_count(dimension, pulses)
    assert len({value(number) for number in numbers}) == 51


def test_a_number_beyond_the_pyramid_is_refused() -> None:
    for dimension, pulses in ((3, 4), (64, 96)):
        beyond = point_indices(torch.zeros(1, dimension, dtype=torch.int64), pulses) + 1
        with pytest.raises(ValueError, match="count of points"):
            indexed_points(beyond, dimension, pulses)


# --- encoder ---


@pytest.mark.parametrize(("dimension", "pulses"), [(3, 4), (4, 4), (5, 3), (4, 6)])
def test_encoder_against_exhaustive_search(dimension: int, pulses: int) -> None:
    points = all_points(dimension, pulses).double()
    vectors = gaussian(4000, dimension)
    best = (vectors @ (points / points.norm(dim=1, keepdim=True)).T).amax(1) / vectors.norm(dim=1)
    greedy = cosines(vectors, nearest_points(vectors, pulses, refine=False))
    refined = cosines(vectors, nearest_points(vectors, pulses))
    assert (best - greedy < 1e-12).double().mean() >= 0.95
    assert (best - greedy).max() <= 0.04
    assert (best - refined < 1e-12).double().mean() >= 0.997
    assert bool((refined >= greedy - 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=9),
    st.integers(1, 40),
    st.booleans(),
)
def test_encoder_properties(values: list[float], pulses: int, refine: bool) -> None:
    vector = torch.tensor([values], dtype=torch.float64)
    y = nearest_points(vector, pulses, refine)
    assert int(y.abs().sum()) == (pulses if bool(vector.any()) else 0)
    assert bool((y.double() * vector >= 0).all())
    assert torch.equal(nearest_points(-vector, pulses, refine)[vector != 0], -y[vector != 0])
    assert torch.equal(nearest_points(vector * 2.0**-40, pulses, refine), y)
    if pulses == 1 and bool(vector.any()):
        assert float(vector[0, y[0].abs().argmax()].abs()) == float(vector.abs().max())
    if not refine and bool(vector.any()):
        floor = (vector.abs() / vector.abs().max()) * (pulses / (vector.abs() / vector.abs().max()).sum())
        assert bool((y.abs() >= floor.floor() - 1).all())


def test_encoder_commutes_with_permutations() -> None:
    vectors = gaussian(200, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_points(vectors[:, order], 13), nearest_points(vectors, 13)[:, order])


@pytest.mark.parametrize(
    ("dimension", "pulses", "decibels"), [(16, 12, 10.8), (16, 27, 17.1), (16, 58, 23.6), (128, 84, 10.2)]
)
def test_signal_to_noise_with_ideal_gain(dimension: int, pulses: int, decibels: float) -> None:
    vectors = gaussian(500 if dimension > 16 else 2000, dimension)
    cosine = cosines(vectors, nearest_points(vectors, pulses, refine=False))
    missed = (vectors.square().sum(1) * (1 - cosine.square())).sum() / vectors.square().sum()
    assert -10 * float(missed.log10()) == pytest.approx(decibels, abs=0.1)


def test_error_vanishes_with_many_pulses() -> None:
    vectors = gaussian(100, 8)
    angles = [float((1 - cosines(vectors, nearest_points(vectors, k)).square()).mean()) for k in (8, 64, 512, 4096)]
    assert all(later < earlier / 30 for earlier, later in zip(angles, angles[1:], strict=False))


# --- amplitudes ---


def test_law_of_pairs_in_closed_form() -> None:
    """For D = 2, s^2 ~ Beta(1, (n - 2) / 2): P(s <= x) = 1 - (1 - x^2)^((n-2)/2)."""
    law = share_law(2, 64)
    for x in torch.linspace(0, 0.9, 50).tolist():
        assert law.cumulative(x) == pytest.approx(1 - (1 - x * x) ** 31, abs=1e-6)
        assert law.quantile(law.cumulative(x)) == pytest.approx(x, abs=1e-3 if x < 0.6 else 1)


def test_gaussian_rows_follow_the_law() -> None:
    """Kolmogorov-Smirnov at the level of 1 %, against Beta(8, 504)."""
    rows = gaussian(200, 1024)
    shares = rows.view(200, 64, 16).norm(dim=2) / rows.norm(dim=1, keepdim=True)
    law = share_law(16, 1024)
    expected = torch.tensor([law.cumulative(s) for s in shares.flatten().sort().values.tolist()])
    count = len(expected)
    steps = torch.arange(count) / count
    distance = float(torch.maximum((expected - steps).abs(), (expected - steps - 1 / count).abs()).max())
    assert distance * count**0.5 < 1.63
    wrong = torch.tensor([share_law(16, 1200).cumulative(s) for s in shares.flatten().sort().values.tolist()])
    assert float((wrong - steps).abs().max()) * count**0.5 > 1.63


def test_lloyd_max_levels_are_a_fixed_point_and_better_than_quantiles() -> None:
    rows = gaussian(100, 1024)
    shares = (rows.view(100, 64, 16).norm(dim=2) / rows.norm(dim=1, keepdim=True)).flatten()
    errors = {}
    for rule in ("lloyd-max", "cdf"):
        levels = amplitude_levels(16, 1024, 4, rule)  # type: ignore[arg-type]
        assert list(levels.values) == sorted(levels.values)
        cells = torch.searchsorted(torch.tensor(levels.limits, dtype=torch.float64), shares)
        errors[rule] = float((torch.tensor(levels.values, dtype=torch.float64)[cells] - shares).square().mean())
        if rule == "cdf":  # cells of equal probability
            assert cells.bincount().double().mul(16 / len(shares)).sub(1).abs().max() < 0.15
        else:
            means = torch.stack([shares[cells == i].mean() for i in range(1, 15)])  # the outermost hold too few
            assert torch.allclose(means, torch.tensor(levels.values[1:-1], dtype=torch.float64), rtol=0.01)
    assert errors["lloyd-max"] < 0.9 * errors["cdf"], errors


def test_levels_are_golden() -> None:
    """They are not stored, so they must never change: multiples of 2^-20, the same on any machine."""
    values = amplitude_levels(16, 1024, 2, "lloyd-max").values
    assert [v * 1048576 for v in values] == [97272, 120207, 140895, 166089]


# --- the grid ---


def test_projection_is_the_best_gain() -> None:
    vectors = gaussian(300, 16)
    y = nearest_points(vectors, 12).double()
    directions = y / y.norm(dim=1, keepdim=True)
    gain = (vectors * directions).sum(1, keepdim=True)
    plain = (vectors - vectors.norm(dim=1, keepdim=True) * directions).norm(dim=1)
    assert bool(((vectors - gain * directions).norm(dim=1) < plain).all())
    assert bool((gain.squeeze(1) <= vectors.norm(dim=1)).all())
    parallel = torch.tensor([[3.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    assert nearest_points(parallel, 4).tolist() == [[3, -1, 0, 0]]


@pytest.mark.parametrize("changes", [{}, {"dimension": 32, "pulses": 40}, {"group_size": 48}, {"storage": "pulses"}])
@pytest.mark.parametrize("columns", [1, 16, 40, 100])
def test_values_while_rounding_are_those_decoded(changes: dict[str, Any], columns: int) -> None:
    if changes == {"group_size": 48}:
        changes = {"group_size": 48, "dimension": 16}
    grid = PyramidGrid(**changes)
    weight = gaussian(5, columns).float()
    fit = grid.fit(weight)
    size = grid.dimension
    padded = torch.nn.functional.pad(weight, (0, -columns % size))
    windows = [grid.round_vectors(padded[:, j : j + size], j, fit) for j in range(0, columns, size)]
    parts = {name: torch.cat([part[name] for _, part in windows], 1) for name in windows[0][1]}
    code = grid.join_vectors(parts, fit, (5, columns))
    assert torch.equal(torch.cat([values for values, _ in windows], 1)[:, :columns], code.decode())
    whole = grid.quantize(weight)
    assert all(torch.equal(t, whole.tensors()[name]) for name, t in code.tensors().items())
    again = code_from(code.spec, code.tensors())
    assert torch.equal(again.decode(), code.decode())


def test_both_storages_hold_the_same_matrix() -> None:
    weight = gaussian(9, 72).float()
    codes = [PyramidGrid(storage=storage).quantize(weight) for storage in ("index", "pulses")]
    assert torch.equal(codes[0].decode(), codes[1].decode())
    assert codes[0].bits_per_weight < codes[1].bits_per_weight


def test_bits_are_those_of_the_card() -> None:
    code = PyramidGrid().quantize(gaussian(2, 1024).float())
    assert code.bits_per_weight == 48 / 16 + 4 / 16 + 16 / 1024
    assert PyramidGrid(pulses=12).quantize(gaussian(2, 1024).float()).bits_per_weight == 2 + 4 / 16 + 16 / 1024


def test_zero_vectors_stay_zero_beside_others() -> None:
    weight = gaussian(4, 64).float()
    weight[:, 16:32] = 0
    weight[2] = 0
    decoded = PyramidGrid().quantize(weight).decode()
    assert not decoded[:, 16:32].any()
    assert not decoded[2].any()
    assert decoded[0, :16].any()


def test_damaged_codes_are_refused() -> None:
    code = PyramidGrid(storage="pulses").quantize(gaussian(3, 32).float())
    assert isinstance(code, Pyramid)
    with pytest.raises(ValueError, match="add up"):
        code_from(code.spec, {**code.tensors(), "directions": code.directions ^ 1}).decode()
    code = PyramidGrid().quantize(gaussian(3, 32).float())
    with pytest.raises(ValueError, match="count of points"):
        code_from(code.spec, {**code.tensors(), "directions": torch.full_like(code.directions, 255)}).decode()
    for wrong in ({"pulses": 0}, {"dimension": 5000}, {"storage": "x"}, {"levels": "x"}, {"group_size": 24}):
        with pytest.raises(ValueError, match="expected"):
            code_from({**code.spec, **wrong}, code.tensors())


def test_less_error_than_uniform_at_no_more_bits() -> None:
    from featherweight.methods.quantize.grids.uniform import UniformGrid

    weight = gaussian(16, 1024).float()
    pyramid = PyramidGrid().quantize(weight)
    for clip in ("minmax", "mse"):
        uniform = UniformGrid(bits=3, clip=clip).quantize(weight)  # type: ignore[arg-type]
        assert pyramid.bits_per_weight < uniform.bits_per_weight + 0.15
        assert (pyramid.decode() - weight).norm() < 0.8 * (uniform.decode() - weight).norm()


# --- in the sweep ---


def correlated(columns: int, seed: int) -> Tensor:
    inputs = gaussian(2048, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 100)
    return (inputs.T @ inputs / len(inputs)).float()


def output_error(code: Code, weight: Tensor, gram: Tensor) -> float:
    missed = (code.decode() - weight).double()
    return float(((missed @ gram.double()) * missed).sum())


def test_sweep_lowers_the_output_error_to_seven_tenths() -> None:
    gram, weight = correlated(64, 0), gaussian(128, 64).float()
    statistics = {"gram": gram, "tokens": torch.tensor([2048])}
    errors = {}
    for gain in ("projection", "output"):
        grid = PyramidGrid(pulses=12, gain=gain)  # type: ignore[arg-type]
        plain = output_error(grid.quantize(weight, statistics), weight, gram)
        swept = Hessian().quantize_source(HeldWeight(weight), grid, statistics, SolveOptions())
        errors[gain] = output_error(swept, weight, gram)
        assert 0.6 < errors[gain] / plain < 0.76
    assert errors["output"] < errors["projection"]


class SignMagnitude(Grid):
    """+- the amplitude levels of a row: what a pyramid of one dimension and one pulse is."""

    norms: PyramidGrid

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        return {"norms": self.norms.fit(weight)["norms"]}

    def levels(self, fit: Fit) -> Tensor:
        shares = torch.tensor(amplitude_levels(1, self.group_size, 4, "lloyd-max").values)
        sizes = fit["norms"].float().unsqueeze(-1) * shares
        return torch.cat([-sizes.flip(-1), sizes], -1)

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        return Dense(self.levels(fit)[:, 0].gather(1, indices.long()))


def test_one_dimension_and_one_pulse_is_scalar_sweep() -> None:
    gram, weight = correlated(48, 3), gaussian(32, 48).float()
    statistics = {"gram": gram, "tokens": torch.tensor([2048])}
    pyramid = PyramidGrid(dimension=1, pulses=1)
    scalar = SignMagnitude(group_size=48, norms=pyramid)
    vector = Hessian().quantize_source(HeldWeight(weight), pyramid, statistics, SolveOptions())
    plain = Hessian().quantize_source(HeldWeight(weight), scalar, statistics, SolveOptions())
    assert torch.allclose(vector.decode(), plain.decode(), rtol=1e-6)
