"""PT2-LLM's asymmetric ternary grid: golden values, fixed points, invariances, and alignment against least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.methods.quantize.grids.offset_trits import Affine, OffsetTritGrid, initial, iterate
from featherweight.methods.quantize.grids.ternary import TernaryGrid
from featherweight.methods.quantize.sorted_groups import SortedGroups
from featherweight.methods.quantize.sweep import sweep
from featherweight.methods.quantize.transforms.reorder import ReorderTransform
from featherweight.storage.codes.offset_trits import OffsetTrits


def golden(count: int) -> Tensor:
    j = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.sin(1.7 * j + 0.3 * j * j) + 0.5 * torch.cos(2.9 * j)


def trits_of(weight: Tensor, fitted: Affine) -> Tensor:
    return ((weight - fitted.mu) / fitted.alpha).round().clamp(-1, 1)


def relative(weight: Tensor, fitted: Affine, trits: Tensor) -> float:
    return float((weight - fitted.alpha * trits - fitted.mu).norm() / weight.norm())


def exact(**settings: object) -> OffsetTritGrid:
    return OffsetTritGrid(**{"scale_dtype": "float32", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "start", "alpha", "mu", "error", "used"),
    [
        (16, 0.29374678, 0.71677897, 0.21288365, 0.25344116, 12),
        (128, 0.36472614, 0.93131141, 0.14523824, 0.36399296, 77),
    ],
)
def test_golden_values(count: int, start: float, alpha: float, mu: float, error: float, used: int) -> None:
    weight = golden(count)
    groups = SortedGroups(weight.unsqueeze(0))
    first = initial(groups)
    threshold = 0.75 * (weight - weight.mean()).abs().mean()
    first_trits = (weight > first.mu + threshold).double() - (weight < first.mu - threshold).double()
    assert relative(weight, first, first_trits) == pytest.approx(start, abs=1e-8)
    found, stopped = iterate(groups, first, 50)
    trits = trits_of(weight, found)
    assert stopped == 2
    assert float(found.alpha) == pytest.approx(alpha, abs=1e-8)
    assert float(found.mu) == pytest.approx(mu, abs=1e-8)
    assert relative(weight, found, trits) == pytest.approx(error, abs=1e-8)
    assert int(trits.abs().sum()) == used


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(-3, 3))
def test_errors_fall_to_a_fixed_point(seed: int, count: int, offset: float) -> None:
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    groups = SortedGroups(weight.unsqueeze(0))
    start = initial(groups)
    threshold = 0.75 * (weight - weight.mean()).abs().mean()
    trits = (weight > start.mu + threshold).double() - (weight < start.mu - threshold).double()
    error = ((weight - start.alpha * trits - start.mu) ** 2).sum()
    for limit in range(1, 12):
        found, _ = iterate(groups, start, limit)
        half = ((weight - found.alpha * trits - found.mu) ** 2).sum()  # after the grid step, old trits
        assert half <= error + 1e-9
        trits = trits_of(weight, found) if float(found.alpha) > 0 else torch.zeros_like(weight)
        error = ((weight - found.alpha * trits - found.mu) ** 2).sum()
        assert error <= half + 1e-9
    found, stopped = iterate(groups, start, 200)
    assert stopped < 200
    if float(found.alpha) > 0:
        design = torch.stack([trits_of(weight, found), torch.ones_like(weight)], 1)
        gradient = design.T @ (weight - design @ torch.stack([found.alpha[0], found.mu[0]]))
        assert gradient.abs().max() < 1e-9


def test_shifts_and_scalings_of_the_weight_move_the_grid_with_it() -> None:
    weight = torch.randn(6, 64, dtype=torch.float64)

    def fitted(changed: Tensor) -> tuple[Affine, Tensor]:
        found, _ = iterate(SortedGroups(changed), initial(SortedGroups(changed)), 50)
        column = Affine(found.alpha.unsqueeze(-1), found.mu.unsqueeze(-1))
        return found, trits_of(changed, column)

    base, trits = fitted(weight)
    shifted, shifted_trits = fitted(weight + 3)
    assert torch.equal(shifted_trits, trits)
    assert torch.allclose(shifted.alpha, base.alpha)
    assert torch.allclose(shifted.mu, base.mu + 3)
    scaled, scaled_trits = fitted(weight * 5)
    assert torch.equal(scaled_trits, trits)
    assert torch.allclose(scaled.alpha, 5 * base.alpha)
    assert torch.allclose(scaled.mu, 5 * base.mu)
    flipped, flipped_trits = fitted(-weight)
    assert torch.equal(flipped_trits, -trits)
    assert torch.allclose(flipped.alpha, base.alpha)
    assert torch.allclose(flipped.mu, -base.mu)


def test_an_offset_is_never_worse_than_the_best_symmetric_scale_for_the_same_trits() -> None:
    weight = torch.randn(50, 64, dtype=torch.float64)
    code = exact(group_size=64).quantize(weight.float())
    assert isinstance(code, OffsetTrits)
    trits = code.unpack().double()
    symmetric = (weight * trits).sum(-1, keepdim=True) / trits.abs().sum(-1, keepdim=True) * trits
    ours = ((code.decode().double() - weight) ** 2).sum(-1)
    assert torch.all(ours <= ((symmetric - weight) ** 2).sum(-1) + 1e-6)


def test_gaussian_errors_with_and_without_a_row_offset() -> None:
    weight = torch.randn(3000, 128, generator=torch.Generator().manual_seed(0))
    centred = weight - weight.mean(-1, keepdim=True)
    grid = OffsetTritGrid(scale_dtype="float32")
    assert float((grid.quantize(weight).decode() - weight).norm() / weight.norm()) == pytest.approx(0.426, abs=0.002)
    moved = weight + 0.5
    error = (grid.quantize(moved).decode() - moved).norm() / centred.norm()
    assert float(error) == pytest.approx(0.427, abs=0.003)
    for scaling in ("twn", "absmean"):
        plain = (TernaryGrid(scaling=scaling).quantize(moved).decode() - moved).norm() / centred.norm()
        assert plain > error + 0.05


@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("mixed", [False, True])
def test_alignment_is_least_squares_of_the_output(tokens: int, mixed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 32, generator=generator)
    inputs = torch.randn(tokens, 32, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3, 32)
    original = inputs + 0.3 * torch.randn(tokens, 32, generator=generator, dtype=torch.float64) if mixed else inputs
    statistics = {"gram": inputs.T @ inputs / tokens, "cross": (original - inputs).T @ inputs / tokens}
    names = {"alignment_inputs": "mixed"} if mixed else {}
    plain = exact(group_size=16, alignment=False).quantize(weight)
    aligned = exact(group_size=16, **names).quantize(weight, statistics)
    assert isinstance(plain, OffsetTrits)
    assert isinstance(aligned, OffsetTrits)
    assert torch.equal(aligned.unpack(), plain.unpack())  # trits are frozen
    for row in range(5):
        for group in range(2):
            window = slice(16 * group, 16 * group + 16)
            trits = plain.unpack()[row, window].double()
            design = np.stack([(inputs[:, window] @ trits).numpy(), inputs[:, window].sum(1).numpy()], 1)
            target = (original[:, window] @ weight[row, window].double()).numpy()
            alpha, mu = np.linalg.lstsq(design, target, rcond=None)[0]
            assert float(aligned.scales[row, group]) == pytest.approx(alpha, rel=1e-4)
            assert float(aligned.offsets[row, group]) == pytest.approx(mu, rel=1e-4, abs=1e-5)
            before = design @ [float(plain.scales[row, group]), float(plain.offsets[row, group])] - target
            after = design @ [float(aligned.scales[row, group]), float(aligned.offsets[row, group])] - target
            assert (after**2).sum() <= (before**2).sum() * (1 + 1e-5)


def test_alignment_to_white_inputs_changes_nothing() -> None:
    weight = torch.randn(7, 200)
    grid = exact(group_size=64)
    aligned = grid.fit(weight, {"gram": 3.0 * torch.eye(200)})
    plain = grid.fit(weight)
    for name in plain:
        assert torch.allclose(aligned[name], plain[name], rtol=1e-5, atol=1e-6)


def test_alignment_without_enough_tokens_keeps_the_fitted_grid() -> None:
    weight = torch.randn(4, 32)
    token = torch.randn(32, dtype=torch.float64)
    grid = exact(group_size=32)
    for gram in (torch.zeros(32, 32), torch.outer(token, token), torch.full((32, 32), torch.nan)):
        aligned, plain = grid.fit(weight, {"gram": gram}), grid.fit(weight)
        assert all(torch.equal(aligned[name], plain[name]) for name in plain)
    damped = grid.model_copy(update={"damping": 0.01}).fit(weight, {"gram": torch.outer(token, token)})
    assert all(value.isfinite().all() for value in damped.values())
    assert not torch.equal(damped["scales"], grid.fit(weight)["scales"])


def test_what_is_asked_of_calibration() -> None:
    assert OffsetTritGrid().needs == ("gram",)
    assert OffsetTritGrid(alignment_inputs="mixed").needs == ("gram", "cross")
    assert OffsetTritGrid(alignment=False).needs == ()


def test_stages_improve_on_each_other() -> None:
    """Output error: threshold start > iterated > aligned, on correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 256, generator=generator) + 0.1
    inputs = torch.randn(2000, 256, generator=generator) @ (
        torch.randn(256, 256, generator=generator) / 16 + 0.7 * torch.eye(256)
    )
    gram = inputs.T @ inputs / 2000

    def output_error(grid: OffsetTritGrid) -> float:
        missed = grid.quantize(weight, {"gram": gram}).decode() - weight
        return float(((missed @ gram) * missed).sum())

    start = output_error(OffsetTritGrid(fitting="init", alignment=False))
    fitted = output_error(OffsetTritGrid(alignment=False))
    aligned = output_error(OffsetTritGrid())
    assert start > fitted > aligned
    assert start > output_error(OffsetTritGrid(fitting="init")) > aligned


def test_compensation_lowers_the_output_error_and_needs_correlation() -> None:
    gains = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(24, 96, generator=generator)
        mixing = torch.randn(96, 96, generator=generator) / 96**0.5 + 0.5 * torch.eye(96)
        gram = mixing.T @ mixing
        grid = exact(group_size=32)

        def loss(decoded: Tensor, weight: Tensor = weight, gram: Tensor = gram) -> float:
            return float((((weight - decoded) @ gram) * (weight - decoded)).sum())

        swept = sweep(weight, {"gram": gram}, grid).code.decode()
        gains.append(loss(swept) / loss(grid.quantize(weight, {"gram": gram}).decode()))
    assert max(gains) < 0.9
    diagonal = {"gram": torch.eye(96) * 2}
    swept = sweep(weight, diagonal, exact(group_size=32)).code.decode()
    assert torch.equal(swept, exact(group_size=32).quantize(weight).decode())


def test_similar_columns_in_a_group_fit_better() -> None:
    """Columns drawn from a few prototypes and shuffled: sorted by similarity, a group needs one offset and scale."""
    generator = torch.Generator().manual_seed(5)
    prototypes = torch.randn(48, 4, generator=generator)
    kinds = torch.arange(4).repeat_interleave(32)[torch.randperm(128, generator=generator)]
    weight = prototypes[:, kinds] + 0.3 * torch.randn(48, 128, generator=generator)
    transform = ReorderTransform(by="similarity", group_size=32).for_layer(weight, {}, 0)
    grid = exact(group_size=32)
    reordered = transform.wrap(grid.quantize(transform.apply(weight))).decode()
    assert (reordered - weight).norm() < 0.8 * (grid.quantize(weight).decode() - weight).norm()
