"""The native solver and the reference give the same bits; both follow the published loop; threads do not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_samples import gaussian, published_loop, relative_error
from torch import Tensor

from featherweight.errors import NonFiniteError, RecipeError
from featherweight.native import library
from featherweight.native.packing import decode_trit_planes, pack_trits
from featherweight.native.ptqtp import (
    NonFiniteWeightError,
    TritPlaneSettings,
    TritPlaneSolution,
    TritPlaneStream,
    assign_trits,
    solve_trit_planes,
)

OPTIONS: list[dict[str, object]] = [
    {},
    {"planes": 1},
    {"planes": 3},
    {"tied": True},
    {"planes": 1, "tied": True},
    {"planes": 3, "tied": True},
    {"tie_order": "paired"},
    {"planes": 3, "tie_order": "paired"},
    {"starts": 2},
    {"starts": 3, "planes": 3},
    {"closing": True},
    {"closing": True, "planes": 3},
    {"closing": True, "tied": True},
    {"max_iterations": 5, "final_least_squares": True},
    {"max_iterations": 1},
    {"canonical": False},
    {"tolerance": 0.02},
    {"condition_threshold": 1e6},
    {"condition_threshold": 8.0},
    {"condition_threshold": 8.0, "planes": 3},
]


def same(one: TritPlaneSolution, other: TritPlaneSolution) -> bool:
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scales, other.scales)
        and torch.equal(one.steps, other.steps)
        and one.iterations == other.iterations
    )


def both(weight: Tensor, **options: object) -> tuple[TritPlaneSolution, TritPlaneSolution]:
    chosen = TritPlaneSettings(**options)
    return solve_trit_planes(weight, chosen, backend="reference"), solve_trit_planes(weight, chosen, 2, "native")


@pytest.mark.usefixtures("native")
class TestNativeEqualsReference:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_options(self, options: dict[str, object], dtype: torch.dtype) -> None:
        weight = gaussian(24, 300, seed=len(str(options)), scale=0.3).to(dtype)
        assert same(*both(weight, **options))

    def test_thousands_of_groups(self) -> None:
        weight = gaussian(64, 8192, seed=9)
        assert same(*both(weight))

    @pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 32, 63, 64, 100, 256, 1000])
    @pytest.mark.parametrize("width", [1, 7, 128, 301])
    def test_sizes(self, size: int, width: int) -> None:
        assert same(*both(gaussian(17, width, seed=size), group_size=size))

    def test_long_groups(self) -> None:
        assert same(*both(gaussian(3, 20000), group_size=1 << 15, max_iterations=8))
        assert same(*both(gaussian(3, 5000), group_size=4096, max_iterations=8))

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 1 << 20),
        levels=st.integers(1, 6),
        planes=st.integers(1, 3),
        order=st.sampled_from(["lexicographic", "paired"]),
        tied=st.booleans(),
        closing=st.booleans(),
    )
    def test_ties_everywhere(self, seed: int, levels: int, planes: int, order: str, tied: bool, closing: bool) -> None:
        """Weights on a coarse grid: equal scales, equal levels, weights on thresholds, zero groups."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-levels, levels + 1, (6, 40), generator=generator).to(torch.bfloat16) / 4
        weight[0] = 0
        one, other = both(weight, planes=planes, group_size=16, tie_order=order, tied=tied, closing=closing)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)

    @pytest.mark.parametrize("planes", [1, 2, 3])
    def test_tied_to_given_scales(self, planes: int) -> None:
        weight, chosen = gaussian(20, 200).to(torch.bfloat16), TritPlaneSettings(planes=planes)
        scales = solve_trit_planes(weight, chosen).scales.to(torch.float16)
        one = assign_trits(weight, scales, chosen, backend="reference")
        assert torch.equal(one, assign_trits(weight, scales, chosen, backend="native"))

    def test_rows_of_a_larger_matrix(self) -> None:
        weight = gaussian(20, 512)[:, 100:400]
        assert same(*both(weight))
        assert same(*both(gaussian(300, 20).T))


class TestDeterminism:
    @pytest.mark.parametrize("options", [{}, {"planes": 3}, {"tied": True}, {"tolerance": 0.02}], ids=str)
    def test_threads(self, native: library.NativeLibrary, options: dict[str, object]) -> None:
        weight, chosen = gaussian(300, 700), TritPlaneSettings(**options)
        one = solve_trit_planes(weight, chosen, threads=1, backend="native")
        for threads in (2, 3, 7):
            assert same(one, solve_trit_planes(weight, chosen, threads=threads, backend="native"))

    @pytest.mark.parametrize("options", [{}, {"planes": 1}, {"planes": 3}, {"tied": True}, {"closing": True}], ids=str)
    def test_instruction_sets(self, native: library.NativeLibrary, options: dict[str, object]) -> None:
        weight, chosen = gaussian(40, 700).to(torch.float16), TritPlaneSettings(**options)
        expected = solve_trit_planes(weight, chosen, backend="native")
        try:
            for name in ("baseline", "avx2", "avx512"):
                try:
                    native.select_isa(name)
                except ValueError:
                    continue
                assert native.isa == name
                assert same(expected, solve_trit_planes(weight, chosen, backend="native"))
        finally:
            native.select_isa("auto")


class TestPublishedLoop:
    @pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 5e-2])
    @pytest.mark.parametrize("order", ["lexicographic", "paired"])
    def test_same_as_the_loop_over_all_groups(self, backend: str, tolerance: float, order: str) -> None:
        weight = gaussian(60, 64, seed=2)
        digits = (-1, 0, 1) if order == "lexicographic" else (0, -1, 1)
        scales, trits, stop, errors = published_loop(weight, tolerance=tolerance, digits=digits)
        chosen = TritPlaneSettings(group_size=64, tolerance=tolerance, canonical=False, tie_order=order)
        found = solve_trit_planes(weight, chosen, backend=backend)
        assert found.iterations == stop
        assert torch.equal(found.trits().to(torch.float64), trits)
        assert torch.allclose(found.scales[:, 0], scales, rtol=1e-9)
        assert relative_error(weight, found.decode()) == pytest.approx(errors[-1], rel=1e-9)

    def test_one_restless_group_keeps_the_others_going(self, backend: str) -> None:
        """The stop is that of the matrix: the same rows stop earlier when the slow row is not there."""
        weight, chosen = gaussian(40, 128), TritPlaneSettings(tolerance=0.01)
        together = solve_trit_planes(weight, chosen, backend=backend)
        alone = [solve_trit_planes(row[None], chosen, backend=backend).iterations for row in weight]
        assert together.iterations >= min(alone)
        assert together.iterations > sorted(alone)[len(alone) // 2]

    def test_final_least_squares_lowers_a_cut_off_error(self, backend: str) -> None:
        weight = gaussian(30, 128)
        plain = solve_trit_planes(weight, TritPlaneSettings(max_iterations=4), backend=backend)
        chosen = TritPlaneSettings(max_iterations=4, final_least_squares=True)
        better = solve_trit_planes(weight, chosen, backend=backend)
        assert relative_error(weight, better.decode()) < relative_error(weight, plain.decode())

    def test_closing_is_best_for_the_stored_scales(self, backend: str) -> None:
        weight = gaussian(30, 256)
        plain = solve_trit_planes(weight, TritPlaneSettings(), backend=backend)
        closed = solve_trit_planes(weight, TritPlaneSettings(closing=True), backend=backend)
        assert torch.equal(closed.scales, plain.scales.to(torch.float16).to(torch.float64))
        stored = TritPlaneSolution(plain.codes, closed.scales, plain.steps, 0, 2, 128)
        assert relative_error(weight, closed.decode()) <= relative_error(weight, stored.decode())


class TestHardGroups:
    @pytest.mark.parametrize("options", [{}, {"planes": 1}, {"planes": 3}, {"tied": True}, {"starts": 3}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_constant_zero_tiny_huge(self, backend: str, options: dict[str, object], dtype: torch.dtype) -> None:
        pattern = gaussian(1, 128, seed=4).to(dtype)
        rows = [torch.zeros(1, 128), torch.full((1, 128), 0.7), pattern.sign() * 3, pattern * 1e-30, pattern * 1e30]
        weight = torch.cat([row.to(dtype) for row in rows])
        chosen = TritPlaneSettings(**options)
        found = solve_trit_planes(weight, chosen, backend=backend)
        decoded = found.decode()
        assert bool(torch.isfinite(found.scales).all())
        assert bool((decoded[0] == 0).all())
        assert bool((found.trits()[:, 0] == 0).all())
        expected = solve_trit_planes(pattern, chosen, backend=backend)
        for row, factor in ((3, 1e-30), (4, 1e30)):
            error = relative_error(weight[row : row + 1], decoded[row : row + 1])
            if chosen.tolerance < factor:
                assert error == pytest.approx(relative_error(pattern, expected.decode()), rel=1e-3)
        if not chosen.one_scale:
            assert torch.allclose(decoded[1:3], weight[1:3].to(torch.float64), rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite(self, backend: str, dtype: torch.dtype, value: float) -> None:
        weight = gaussian(50, 300).to(dtype)
        weight[41, 299] = weight[17, 5] = weight[17, 290] = value
        with pytest.raises(NonFiniteError, match="row 17, column 5") as caught:
            solve_trit_planes(weight, backend=backend, threads=3)
        assert isinstance(caught.value, NonFiniteWeightError)
        assert (caught.value.row, caught.value.column) == (17, 5)

    def test_refused(self, backend: str) -> None:
        for weight in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 2, dtype=torch.int8)):
            with pytest.raises(ValueError, match="weight must be"):
                solve_trit_planes(weight, backend=backend)
        with pytest.raises(ValueError, match="planes must be"):
            TritPlaneSettings(planes=4)
        with pytest.raises(ValueError, match="group_size"):
            TritPlaneSettings(group_size=0)


class TestStream:
    @pytest.mark.parametrize(
        "options", [{}, {"planes": 3, "closing": True}, {"tied": True}, {"tolerance": 0.05}], ids=str
    )
    @pytest.mark.parametrize("packing", ["base3", "2bit"])
    def test_same_as_in_one_piece(self, backend: str, options: dict[str, object], packing: str) -> None:
        weight, chosen = gaussian(97, 131), TritPlaneSettings(group_size=32, **options)
        whole = solve_trit_planes(weight, chosen, backend=backend)
        stream = TritPlaneStream(97, 131, chosen, packing=packing, backend=backend)
        for first, last in ((60, 97), (0, 20), (20, 60)):
            stream.add(first, weight[first:last])
        reads: list[tuple[int, int]] = []

        def read(first: int, last: int) -> Tensor:
            reads.append((first, last))
            return weight[first:last]

        packed, scales = stream.finish(read)
        assert stream.iterations == whole.iterations
        assert torch.equal(packed, torch.stack([pack_trits(t, packing) for t in whole.trits()]))
        assert torch.equal(scales, whole.scales.to(torch.float16))
        assert bool(reads) == (options.get("tolerance") == 0.05)
        decoded = decode_trit_planes(packed, scales, (97, 131), 32, packing)
        assert relative_error(weight, decoded.to(torch.float64)) < 0.25

    def test_refusals(self, backend: str) -> None:
        weight = gaussian(40, 16)
        stream = TritPlaneStream(40, 16, backend=backend)
        with pytest.raises(ValueError, match="multiple of 20"):
            stream.add(0, weight[:10])
        with pytest.raises(ValueError, match="not part of"):
            stream.add(20, weight)
        stream.add(0, weight[:20])
        with pytest.raises(ValueError, match="overlap"):
            stream.add(0, weight[:20])
        with pytest.raises(ValueError, match="row 20 was never added"):
            stream.finish(lambda first, last: weight[first:last])
        broken = weight[20:].clone()
        broken[3, 7] = torch.nan
        with pytest.raises(NonFiniteWeightError, match="row 23, column 7"):
            stream.add(20, broken)

    def test_scales_too_large_for_storage(self, backend: str) -> None:
        stream = TritPlaneStream(20, 16, backend=backend)
        weight = gaussian(20, 16)
        weight[5] *= 1e9
        with pytest.raises(RecipeError, match="row 5.*float32"):
            stream.add(0, weight)
