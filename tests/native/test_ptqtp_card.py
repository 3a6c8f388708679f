"""What is known of PTQTP from the paper and from independent computations, for both backends."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_samples import gaussian, golden, laplace, relative_error
from torch import Tensor

from featherweight.native import library
from featherweight.native.ptqtp import TritPlaneSettings, TritPlaneSolution, assign_trits, solve_trit_planes
from featherweight.native.ptqtp_settings import join_trits, split_codes


def solve(weight: Tensor, backend: str, **settings: object) -> TritPlaneSolution:
    return solve_trit_planes(weight, TritPlaneSettings(**settings), threads=1, backend=backend)


def lattice(ratio: float, groups: int = 400) -> tuple[Tensor, Tensor]:
    """Weights that are two trit-planes with scales in a given ratio, and their trits."""
    trits = torch.randint(-1, 2, (2, groups, 128), generator=torch.Generator().manual_seed(1))
    return (ratio * trits[0] + trits[1]).to(torch.float64), trits


def exact_groups(weight: Tensor, found: TritPlaneSolution) -> float:
    error = (weight - found.decode()).norm(dim=1) / weight.norm(dim=1)
    return float((error < 1e-6).double().mean())


class TestLattice:
    """1: planes that exist are found, from the start that leads to them."""

    @pytest.mark.parametrize(
        ("ratio", "low", "high"), [(1.3, 1.0, 1.0), (1.5, 0.88, 0.98), (2.0, 0.31, 0.51), (3.0, 0, 0)]
    )
    def test_published_start(self, backend: str, ratio: float, low: float, high: float) -> None:
        weight, _ = lattice(ratio)
        assert low <= exact_groups(weight, solve(weight, backend)) <= high

    @pytest.mark.parametrize(("ratio", "low"), [(1.3, 1.0), (3.0, 0.99)])
    def test_several_starts(self, backend: str, ratio: float, low: float) -> None:
        weight, _ = lattice(ratio)
        assert exact_groups(weight, solve(weight, backend, starts=2)) >= low

    @pytest.mark.parametrize("ratio", [1.3, 1.5, 3.0])
    def test_true_trits_are_a_fixed_point(self, backend: str, ratio: float) -> None:
        weight, trits = lattice(ratio)
        scales = torch.tensor([ratio, 1.0], dtype=torch.float64).expand(len(weight), 1, 2)
        codes = assign_trits(weight, scales, TritPlaneSettings(), backend=backend)
        assert torch.equal(split_codes(codes, 2).to(torch.int64), trits)


class TestDescent:
    """2: the error never grows, and each trit is the best of nine."""

    def test_error_never_increases(self, backend: str) -> None:
        weight = gaussian(64, 256)
        before = torch.full((64,), torch.inf, dtype=torch.float64)
        for steps in range(1, 20):
            now = (weight - solve(weight, backend, max_iterations=steps, tolerance=0.0).decode()).pow(2).sum(1)
            assert bool((now <= before * (1 + 1e-6)).all())
            before = now

    @pytest.mark.parametrize("planes", [1, 2, 3])
    def test_trits_are_nearest(self, backend: str, planes: int) -> None:
        weight = gaussian(20, 200)
        found = solve(weight, backend, planes=planes)
        group = torch.arange(200) // 128
        tuples = torch.tensor(list(itertools.product((-1, 0, 1), repeat=planes)), dtype=torch.float64)
        levels = found.scales[:, group] @ tuples.T
        best = (weight.to(torch.float64)[..., None] - levels).abs().amin(-1)
        assert torch.allclose((weight - found.decode()).abs(), best, rtol=0, atol=1e-12)

    def test_few_symmetric_values(self, backend: str) -> None:
        found = solve(gaussian(8, 128), backend)
        for row in found.decode():
            values = row.unique()
            assert len(values) <= 9
            assert set(values.abs().tolist()) >= set(values[values > 0].tolist())


class TestGolden:
    """3: the values of one formula, digit by digit."""

    CASES = [
        (16, [0.364607, 0.294905], 0.14751658, 7, [0.59447657, 0.39296357], [12, 9]),
        (128, [0.408993, 0.262436], 0.13093458, 10, [0.77188354, 0.49823528], [85, 84]),
    ]

    @pytest.mark.parametrize(("size", "first", "error", "stop", "scales", "nonzeros"), CASES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_golden(
        self,
        backend: str,
        dtype: torch.dtype,
        size: int,
        first: list[float],
        error: float,
        stop: int,
        scales: list[float],
        nonzeros: list[int],
    ) -> None:
        weight = golden(size).to(dtype)
        digits = 5e-9 if dtype == torch.float64 else 2e-7
        for t, expected in enumerate(first, start=1):
            early = solve(weight, backend, group_size=size, max_iterations=t)
            assert relative_error(weight, early.decode()) == pytest.approx(expected, abs=5e-7)
        found = solve(weight, backend, group_size=size)
        assert found.iterations == stop
        assert relative_error(weight, found.decode()) == pytest.approx(error, abs=digits)
        assert found.scales.flatten().tolist() == pytest.approx(scales, abs=digits)
        assert (found.trits() != 0).sum((1, 2)).tolist() == nonzeros


class TestStatistics:
    """4: relative errors on random weights."""

    @pytest.mark.parametrize(("size", "expected"), [(32, 0.158), (64, 0.163), (128, 0.166), (256, 0.167)])
    def test_gaussian(self, backend: str, size: int, expected: float) -> None:
        weight = gaussian(48, 4096)
        assert relative_error(weight, solve(weight, backend, group_size=size).decode()) == pytest.approx(
            expected, abs=1.5e-3
        )

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"tie_order": "paired"}, 0.169),
            ({"starts": 3}, 0.163),
            ({"planes": 1}, 0.433),
        ],
    )
    def test_options(self, backend: str, settings: dict[str, object], expected: float) -> None:
        weight = gaussian(48, 4096)
        assert relative_error(weight, solve(weight, backend, **settings).decode()) == pytest.approx(
            expected, abs=1.5e-3
        )

    def test_three_planes_beat_two_by_more_than_half(self, backend: str) -> None:
        weight = gaussian(32, 1024)
        assert relative_error(weight, solve(weight, backend, planes=3).decode()) < 0.08

    def test_other_distributions(self, backend: str) -> None:
        uniform = torch.rand(48, 4096, generator=torch.Generator().manual_seed(3)) - 0.5
        assert relative_error(uniform, solve(uniform, backend).decode()) == pytest.approx(0.125, abs=2e-3)
        weight = laplace(48, 4096).to(torch.float32)
        assert relative_error(weight, solve(weight, backend).decode()) == pytest.approx(0.204, abs=3e-3)
        paired = solve(weight, backend, tie_order="paired")
        assert relative_error(weight, paired.decode()) == pytest.approx(0.225, abs=3e-3)

    def test_long_groups_approach_the_optimum(self, backend: str) -> None:
        weight = gaussian(4, 1 << 14)
        found = solve(weight, backend, group_size=1 << 14)
        assert relative_error(weight, found.decode()) == pytest.approx(0.1704, abs=3e-3)
        ratio = found.scales[..., 0] / found.scales[..., 1]
        assert bool(((ratio > 1.4) & (ratio < 1.6)).all())

    def test_tied_lies_between_free_scales_and_the_optimum_of_ratio_three(self, backend: str) -> None:
        weight = gaussian(48, 4096)
        error = relative_error(weight, solve(weight, backend, tied=True).decode())
        assert error == pytest.approx(0.171, abs=1.5e-3)
        assert relative_error(weight, solve(weight, backend).decode()) < error < 0.1753


class TestEquivariance:
    """5: what must not matter."""

    @given(exponent=st.integers(-40, 40))
    def test_scale(self, exponent: int) -> None:
        weight, factor = gaussian(2, 96), 2.0**exponent
        for backend in ["reference"] + ["native"] * (library.get() is not None):
            one, other = solve(weight, backend, tolerance=0.0), solve(weight * factor, backend, tolerance=0.0)
            assert torch.equal(one.codes, other.codes)
            assert torch.allclose(one.scales * factor, other.scales, rtol=1e-12)

    def test_permutation(self, backend: str) -> None:
        weight = gaussian(16, 128)
        order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
        one, other = solve(weight, backend), solve(weight[:, order], backend)
        assert torch.equal(one.codes[:, order], other.codes)
        assert torch.allclose(one.scales, other.scales, rtol=1e-12)

    def test_negation_swaps_planes_and_flips_signs(self, backend: str) -> None:
        weight = gaussian(16, 128)
        one, other = solve(weight, backend, canonical=False), solve(-weight, backend, canonical=False)
        assert torch.equal(one.trits(), -other.trits().flip(0))
        assert torch.equal(one.scales, other.scales.flip(-1))
        assert torch.equal(solve(weight, backend).trits(), -solve(-weight, backend).trits())

    def test_canonical_order(self, backend: str) -> None:
        weight = gaussian(16, 256)
        raw, stored = solve(weight, backend, canonical=False), solve(weight, backend)
        assert bool((stored.scales[..., 0] >= stored.scales[..., 1]).all())
        assert bool((stored.scales >= 0).all())
        assert torch.equal(raw.decode(), stored.decode())
        assert not torch.equal(raw.scales, stored.scales)


class TestIterations:
    """6: the first iteration in closed form, and the error as it falls."""

    def test_first_scales(self, backend: str) -> None:
        weight = gaussian(64, 128)
        found = solve(weight, backend, max_iterations=1)
        expected = (weight.to(torch.float64).abs().sum(1) / 256)[:, None, None].expand(-1, 1, 2)
        assert torch.allclose(found.scales, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("steps", "expected", "tolerance"),
        [
            (1, 0.489, 2e-3),
            (2, 0.349, 2e-3),
            (3, 0.272, 2e-3),
            (5, 0.2075, 2e-3),
            (10, 0.173, 2e-3),
            (15, 0.1676, 2e-3),
        ],
    )
    def test_error_by_iteration(self, backend: str, steps: int, expected: float, tolerance: float) -> None:
        weight = gaussian(48, 4096)
        found = solve(weight, backend, max_iterations=steps)
        assert relative_error(weight, found.decode()) == pytest.approx(expected, abs=tolerance)

    def test_not_idempotent(self, backend: str) -> None:
        once = solve(gaussian(64, 1024), backend).decode()
        assert relative_error(once, solve(once, backend).decode()) > 0.02


def test_split_and_join_are_inverse() -> None:
    codes = torch.arange(27, dtype=torch.uint8)
    assert torch.equal(join_trits(split_codes(codes, 3)), codes)
    assert split_codes(codes, 3)[:, 5].tolist() == [-1, 0, 1]
