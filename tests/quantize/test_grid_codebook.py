"""Weighted one-dimensional k-means: exact programme against brute force, Lloyd against both, weights, removals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.methods.quantize.corrections.outliers import DenseAndSparse
from featherweight.methods.quantize.grids.codebook import CodebookGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.kmeans import density_start, exact_centroids, lloyd, plus_plus_start, quantile_start
from featherweight.methods.quantize.sorted_groups import SortedGroups
from featherweight.storage.codes.codebook import Codebook


def drawn(rows: int, count: int, seed: int) -> SortedGroups:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, count, generator=generator)
    return SortedGroups(values, torch.rand(rows, count, generator=generator) ** 3)


def brute_force(values: Tensor, weights: Tensor, count: int) -> float:
    """Least weighted squared error over all cuts of sorted values into `count` intervals."""
    best = float("inf")
    n = len(values)
    for cuts in itertools.combinations(range(1, n), count - 1):
        error = 0.0
        for a, b in itertools.pairwise((0, *cuts, n)):
            w, v = weights[a:b], values[a:b]
            error += float((w * (v - (w * v).sum() / w.sum()) ** 2).sum())
        best = min(best, error)
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 11), st.sampled_from([2, 4]))
def test_the_dynamic_programme_is_exact(seed: int, size: int, count: int) -> None:
    groups = drawn(3, size, seed)
    found = groups.squared_error(exact_centroids(groups, count))
    for row in range(3):
        expected = brute_force(groups.values[row], groups.weights[row], count)
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)


def test_lloyd_does_not_move_the_optimum_and_never_beats_it() -> None:
    groups = drawn(20, 150, 1)
    best = exact_centroids(groups, 8)
    assert torch.allclose(lloyd(groups, best, 50), best, atol=1e-9)
    draws = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for start in (quantile_start(groups, 8), plus_plus_start(groups, draws), density_start(groups, 8)):
        assert torch.all(groups.squared_error(lloyd(groups, start, 50)) >= groups.squared_error(best) - 1e-9)


def test_the_density_start_ends_near_the_optimum() -> None:
    for seed in range(3):
        groups = drawn(30, 512, seed)
        best = groups.squared_error(exact_centroids(groups, 8)).sum()
        assert groups.squared_error(lloyd(groups, density_start(groups, 8), 50)).sum() < 1.1 * best


def test_every_assignment_and_every_update_lowers_the_error() -> None:
    groups = drawn(10, 200, 2)
    centroids = quantile_start(groups, 8)
    error = groups.squared_error(centroids)
    for _ in range(15):
        cells = torch.searchsorted((centroids[:, 1:] + centroids[:, :-1]) / 2, groups.values)
        moved = lloyd(groups, centroids, 1)
        updated = (groups.weights * (groups.values - moved.gather(-1, cells)) ** 2).sum(-1)
        assert torch.all(updated <= error + 1e-9)
        error = groups.squared_error(moved)
        assert torch.all(error <= updated + 1e-9)
        centroids = moved


def test_empty_clusters_keep_their_centroid() -> None:
    groups = SortedGroups(torch.tensor([[1.0, 2.0, 3.0]]))
    assert lloyd(groups, torch.tensor([[1.0, 2.5, 50.0, 60.0]]).double(), 10)[0, 2:].tolist() == [50.0, 60.0]


@pytest.mark.parametrize("exact", [False, True])
def test_few_distinct_values_are_kept_exactly(exact: bool) -> None:
    values = torch.tensor([-2.0, -0.5, 0.25, 3.0, 7.0, -1.0, 0.5, 1.5])
    weight = values[torch.randint(0, 8, (5, 90), generator=torch.Generator().manual_seed(3))]
    grid = CodebookGrid(bits=3, exact=exact)
    assert torch.equal(grid.quantize(weight).decode(), weight)


def test_constant_weights_are_no_weights_and_their_scale_does_not_matter() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(4))
    fisher = torch.rand(4, 300, generator=torch.Generator().manual_seed(5)) ** 4
    grid, plain = CodebookGrid(bits=3, weighting="fisher"), CodebookGrid(bits=3)
    assert torch.equal(
        grid.fit(weight, {"fisher": torch.full((4, 300), 0.25)})["codebooks"], plain.fit(weight)["codebooks"]
    )
    small = grid.fit(weight, {"fisher": fisher * 2.0**-60})["codebooks"]
    assert torch.equal(small, grid.fit(weight, {"fisher": fisher})["codebooks"])
    assert not torch.equal(small, plain.fit(weight)["codebooks"])
    for unusable in (torch.zeros(4, 300), torch.full((4, 300), torch.nan)):
        assert torch.equal(grid.fit(weight, {"fisher": unusable})["codebooks"], plain.fit(weight)["codebooks"])


def test_weights_pay_for_a_quadratic_loss() -> None:
    """0.5 sum F (w - w0)^2 with F log-normal: weighted < unweighted < min-max uniform, at the same bits."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(16, 512, generator=generator)
    fisher = torch.exp(1.5 * torch.randn(16, 512, generator=generator))
    for bits in (3, 4):
        weighted = CodebookGrid(bits=bits, weighting="fisher", start="density")
        plain = CodebookGrid(bits=bits, start="density")
        uniform = UniformGrid(bits=bits, group_size=512)
        losses = [
            float((fisher * (grid.quantize(weight, {"fisher": fisher}).decode() - weight) ** 2).sum())
            for grid in (weighted, plain, uniform)
        ]
        assert losses == sorted(losses)


def test_gram_weights_are_those_of_the_columns() -> None:
    weight = torch.randn(3, 60, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(60)
    by_gram = CodebookGrid(bits=2, weighting="gram").fit(weight, {"gram": torch.diag(importance)})
    by_fisher = CodebookGrid(bits=2, weighting="fisher").fit(weight, {"fisher": importance.expand(3, 60)})
    assert torch.equal(by_gram["codebooks"], by_fisher["codebooks"])
    assert CodebookGrid(weighting="gram").needs == ("gram",)
    assert CodebookGrid(weighting="fisher").needs == ("fisher",)
    assert CodebookGrid().needs == ()


def test_removed_weights_do_not_enter_the_fit_and_take_the_value_nearest_to_zero() -> None:
    weight = torch.rand(3, 80, generator=torch.Generator().manual_seed(8)) + 1
    removed = weight.clone()
    removed[:, ::5] = 0
    grid = CodebookGrid(bits=2)
    kept = torch.ones(80, dtype=torch.bool)
    kept[::5] = False
    fit = grid.fit(removed)
    assert torch.equal(fit["codebooks"], grid.fit(weight[:, kept])["codebooks"])
    decoded = grid.nearest(removed, fit).decode()
    assert torch.equal(decoded[:, ::5], fit["codebooks"][:, 0, :1].float().expand(3, 16))
    assert float(CodebookGrid(bits=2, ignore_zeros=False).fit(removed)["codebooks"].min()) == 0


def test_one_codebook_a_row_is_the_default_and_counts_its_bits() -> None:
    code = CodebookGrid(bits=3).quantize(torch.randn(4, 4096))
    assert isinstance(code, Codebook)
    assert code.group_size is None
    assert code.bits_per_weight == 3 + 16 * 8 / 4096
    assert CodebookGrid(bits=3, group_size=64).quantize(torch.randn(4, 256)).bits_per_weight == 3 + 16 * 8 / 64


def test_the_seed_decides_the_start() -> None:
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(9))
    first, again, other = (CodebookGrid(bits=4, seed=seed).fit(weight)["codebooks"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dense_and_sparse_together_give_the_removed_weights_back() -> None:
    """What the code decodes to elsewhere does not depend on the removed values."""
    generator = torch.Generator().manual_seed(10)
    weight = torch.randn(8, 400, generator=generator)
    fisher = torch.exp(2 * torch.randn(8, 400, generator=generator))
    correction = DenseAndSparse(sensitive=0.005, outliers=0.01, value_dtype="float32")
    grid = CodebookGrid(bits=3, weighting="fisher", scale_dtype="float32")

    def compressed(original: Tensor) -> tuple[Tensor, Tensor]:
        rest, _ = correction.split(original, {"fisher": fisher})
        dense = grid.quantize(rest, {"fisher": fisher})
        return correction.correct(original, dense, {"fisher": fisher}).decode(), (rest == 0) & (original != 0)

    decoded, removed = compressed(weight)
    assert int(removed.sum()) == 16 + 32
    assert torch.allclose(decoded[removed], weight[removed], rtol=1e-6, atol=1e-7)
    larger = torch.where(removed, weight * 1.5, weight)
    again, removed_again = compressed(larger)
    assert torch.equal(removed_again, removed)
    assert torch.equal(again[~removed], decoded[~removed])
