"""Corrections: low-rank compensation (ZeroQuant-V2) and dense-and-sparse decomposition (SqueezeLLM)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.methods.quantize.base import Correction
from featherweight.methods.quantize.corrections.low_rank import LowRankCorrection
from featherweight.methods.quantize.corrections.outliers import DenseAndSparse, largest_mask, quartile_threshold
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.truncated_svd import truncated_svd
from featherweight.methods.recipe import load_recipe
from featherweight.registry import registered
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.uniform import Uniform

LAYER_CORRECTIONS = {
    name: cls
    for name, cls in registered("correction").items()
    if cls.scope == "layer"  # type: ignore[attr-defined]
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(rows: int, columns: int) -> Dense:
    return Dense(torch.zeros(rows, columns))


def term(code: Code) -> Code:
    assert isinstance(code, Sum)
    return code.terms[-1]


# What every correction must satisfy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 256), (7, 200), (5, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("name", sorted(LAYER_CORRECTIONS))
def test_a_corrected_code_is_nearer_and_survives(name: str, shape: tuple[int, int]) -> None:
    correction, weight, grid = LAYER_CORRECTIONS[name](), numbers(*shape), UniformGrid(bits=2, group_size=32)
    statistics = {"fisher": weight.roll(1).square()}
    rest, _ = correction.split(weight, statistics)
    code = grid.quantize(rest)
    corrected = correction.correct(weight, code, statistics)
    assert (corrected.decode() - weight).norm() <= (code.decode() - weight).norm()
    assert torch.equal(code_from(corrected.spec, corrected.tensors()).decode(), corrected.decode())
    assert corrected.nbytes - code.nbytes == (correction.extra_bytes(shape) if corrected is not code else 0)
    again = correction.correct(weight, code, statistics)
    assert all(torch.equal(again.tensors()[key], tensor) for key, tensor in corrected.tensors().items())


@pytest.mark.parametrize("name", sorted(LAYER_CORRECTIONS))
def test_a_matrix_of_zeros(name: str) -> None:
    correction = LAYER_CORRECTIONS[name]()
    rest, _ = correction.split(torch.zeros(8, 40), {})
    corrected = correction.correct(torch.zeros(8, 40), UniformGrid().quantize(rest), {})
    assert torch.equal(corrected.decode(), torch.zeros(8, 40))


# LoRC ----------------------------------------------------------------------------------------------------------------


def lorc(rank: int, factors: str = "float32", weighted: bool = False) -> LowRankCorrection:
    return LowRankCorrection(rank=rank, factors=factors, weighted=weighted)


def test_full_rank_restores_the_weight() -> None:
    weight = numbers(20, 33)
    code = UniformGrid(bits=3, group_size=16).quantize(weight)
    assert torch.allclose(lorc(50).correct(weight, code, {}).decode(), weight, atol=2e-6)


@pytest.mark.parametrize("shape", [(96, 160), (600, 640)], ids=str)
def test_the_error_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    """Eckart-Young to 1e-6, also where singular values come from the Krylov method; no other matrix does better."""
    weight = numbers(*shape)
    code = UniformGrid(bits=3, group_size=32).quantize(weight)
    error = (weight - code.decode()).double()
    singular = torch.linalg.svdvals(error)
    for rank in (1, 8):
        corrected = lorc(rank).correct(weight, code, {})
        left, right = term(corrected).factors()  # type: ignore[attr-defined]
        found = (error - left.double() @ right.double()).square().sum()
        assert float(found) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-6)
        for seed in range(5):  # alternating least squares from random factors
            other = numbers(rank, shape[1], seed=seed).double()
            for _ in range(5):
                first = error @ torch.linalg.pinv(other)
                other = torch.linalg.pinv(first) @ error
            assert found <= (error - first @ other).square().sum() * (1 + 1e-9)


def test_singular_triplets_are_orthonormal_and_repeatable() -> None:
    matrix = numbers(550, 530).double()
    (u, s, v), again = truncated_svd(matrix, 8), truncated_svd(matrix, 8)
    assert torch.allclose(u.T @ u, torch.eye(8, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(v @ v.T, torch.eye(8, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(s, torch.linalg.svdvals(matrix)[:8], rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((u, s, v), again, strict=True))


def test_more_rank_less_error_and_never_more_than_without() -> None:
    weight = numbers(64, 200)
    for grid in (UniformGrid(bits=2, group_size=64), UniformGrid(bits=4), TritPlaneGrid()):
        code = grid.quantize(weight)
        errors = [(weight - code.decode()).norm()]
        errors += [(weight - lorc(rank).correct(weight, code, {}).decode()).norm() for rank in (1, 2, 4, 8, 16, 32)]
        assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("factors", ["float16", "int8", "float32"])
@pytest.mark.parametrize("shape", [(16, 64), (600, 520)], ids=str)
def test_a_weight_on_the_grid_gets_zero_factors(factors: str, shape: tuple[int, int]) -> None:
    code = UniformGrid(bits=4, group_size=32).quantize(numbers(*shape))
    corrected = lorc(8, factors).correct(code.decode(), code, {})
    left, right = term(corrected).factors()  # type: ignore[attr-defined]
    assert not left.any()
    assert torch.isfinite(right).all()
    assert torch.equal(corrected.decode(), code.decode())
    assert corrected.nbytes == code.nbytes + lorc(8, factors).extra_bytes(shape)


def test_independent_errors_have_little_to_compress() -> None:
    """The honesty test: rank m takes about 4 m / d of an error with independent entries."""
    for size, rank in ((512, 8), (1024, 8)):
        error = numbers(size, size)
        corrected = lorc(rank).correct(error, zeros(size, size), {}).decode()
        captured = 1 - float((error - corrected).square().sum() / error.square().sum())
        assert captured == pytest.approx(4 * rank / size, rel=0.12)


def test_a_planted_rank_is_recovered() -> None:
    planted = numbers(300, 4, seed=1) @ numbers(4, 400, seed=2)
    found = lorc(4).correct(planted + 0.05 * numbers(300, 400), zeros(300, 400), {}).decode()
    assert (found - planted).norm() < 0.02 * planted.norm()


def test_int8_factors_keep_the_product() -> None:
    weight = numbers(256, 320)
    code = UniformGrid(bits=3).quantize(weight)
    exact, rounded = (term(lorc(8, kind).correct(weight, code, {})).decode() for kind in ("float32", "int8"))
    assert (exact - rounded).norm() <= 0.02 * exact.norm()
    half = term(lorc(8, "float16").correct(weight, code, {})).decode()
    assert (exact - half).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("std", [1e-30, 1e-6, 1e4, 1e30])
@pytest.mark.parametrize("factors", ["float16", "int8"])
def test_factors_of_any_size(factors: str, std: float) -> None:
    weight = (numbers(4, 2) @ numbers(2, 64, seed=1)) * std
    corrected = lorc(2, factors).correct(weight, zeros(4, 64), {}).decode()
    assert float((corrected - weight).double().norm()) < 0.02 * float(weight.double().norm())


def test_weighted_is_better_for_the_output_and_worse_for_the_weight() -> None:
    weight, inputs = numbers(48, 96), numbers(400, 96, seed=3) * numbers(96, seed=4).exp()
    gram = inputs.T @ inputs / 400
    code = UniformGrid(bits=2).quantize(weight)
    plain = lorc(6).correct(weight, code, {"gram": gram}).decode() - weight
    weighted = lorc(6, weighted=True).correct(weight, code, {"gram": gram}).decode() - weight
    assert plain.norm() < weighted.norm()
    assert (inputs @ weighted.T).norm() < 0.95 * (inputs @ plain.T).norm()
    assert lorc(6, weighted=True).needs == ("gram",)
    assert lorc(6).needs == ()
    unit = lorc(6, weighted=True).correct(weight, code, {"gram": 3 * torch.eye(96)}).decode() - weight
    assert torch.allclose(unit, plain, atol=1e-5)


@pytest.mark.parametrize("gram", [torch.zeros(96, 96), torch.ones(96, 96), -torch.eye(96)], ids=["zero", "one", "neg"])
def test_weighted_with_a_hopeless_gram_matrix(gram: Tensor) -> None:
    weight = numbers(48, 96)
    code = UniformGrid(bits=2).quantize(weight)
    assert torch.isfinite(lorc(6, weighted=True).correct(weight, code, {"gram": gram}).decode()).all()
    with pytest.raises(ValueError, match="not finite"):
        lorc(6, weighted=True).correct(weight, code, {"gram": torch.full((96, 96), torch.nan)})


def test_presets_of_zeroquant_v2() -> None:
    """The gain of LoRC grows as bits fall; bits are counted with factors and their scales."""
    weight, gains = numbers(128, 256) * numbers(128, 1, seed=1).exp(), []
    for name, bits in (("zeroquant-v2", 4), ("zeroquant-v2-3", 3), ("zeroquant-v2-2", 2)):
        recipe = load_recipe(name)
        code = recipe.grid.quantize(weight)
        assert isinstance(code, Uniform)
        assert (code.bits, code.group_size, code.symmetric) == (bits, 128, False)
        (correction,) = recipe.corrections
        corrected = correction.correct(weight, code, {})
        added = 8 * (128 + 256) + 2 * (128 + 8)
        assert corrected.nbytes - code.nbytes == added == recipe.extra_bytes((128, 256))
        gains.append(float((code.decode() - weight).norm() - (corrected.decode() - weight).norm()))
    assert gains == sorted(gains)
    assert gains[0] > 0


# Dense and sparse ----------------------------------------------------------------------------------------------------


def test_removed_places_decode_exactly() -> None:
    """SqueezeLLM test 4: float32 values give W itself, whatever the dense part decodes to there."""
    weight = numbers(40, 300).bfloat16().float()
    for grid in (UniformGrid(bits=3), UniformGrid(bits=2, symmetric=True), TritPlaneGrid()):
        correction = DenseAndSparse(outliers=0.02, value_dtype="float32")
        rest, beside = correction.split(weight, {})
        assert beside is None
        mask = correction.removed(weight, {})
        assert not rest[mask].any()
        code = grid.quantize(rest)
        corrected = correction.correct(weight, code, {})
        assert torch.equal(corrected.decode()[mask], weight[mask])
        assert torch.equal(corrected.decode()[~mask], code.decode()[~mask])
        half = DenseAndSparse(outliers=0.02).correct(weight, code, {}).decode()
        assert torch.allclose(half[mask], weight[mask], rtol=2.0**-10)


def test_the_dense_part_does_not_see_what_was_removed() -> None:
    weight = numbers(40, 300)
    correction = DenseAndSparse()
    mask = correction.removed(weight, {})
    louder = torch.where(mask, weight * 50, weight)
    assert torch.equal(correction.removed(louder, {}), mask)
    codes = [UniformGrid(bits=3).quantize(correction.split(w, {})[0]) for w in (weight, louder)]
    assert torch.equal(codes[0].decode(), codes[1].decode())
    gentle = (codes[0].decode() - weight).norm(), (correction.correct(weight, codes[0], {}).decode() - weight).norm()
    assert gentle[1] < 0.97 * gentle[0]


def test_sensitive_weights_are_taken_first_and_exactly() -> None:
    weight, fisher = numbers(50, 80), numbers(50, 80, seed=1).square()
    correction = DenseAndSparse(sensitive=0.01, outliers=0.02)
    mask = correction.removed(weight, {"fisher": fisher})
    sensitive = largest_mask(fisher, 40)
    assert int(mask.sum()) == 40 + 80
    assert mask[sensitive].all()
    rest = weight.abs().masked_fill(sensitive, 0)
    assert rest[mask & ~sensitive].min() >= rest[~mask].max()
    assert int(correction.removed(weight, {}).sum()) == 80  # no gradients: outliers alone
    assert correction.needs == ("fisher",)
    assert DenseAndSparse(sensitive=0).needs == ()


def test_ties_do_not_change_the_count() -> None:
    mask = largest_mask(torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]]), 3)
    assert mask.tolist() == [[False, True, True], [False, False, True]]
    assert int(largest_mask(torch.zeros(3, 4), 5).sum()) == 5
    assert not largest_mask(torch.ones(3, 4), 0).any()


def test_the_quartile_rule() -> None:
    weight = torch.arange(1.0, 101.0).view(10, 10) - 40  # quartiles -15 and 35
    assert quartile_threshold(weight, 0.5) == 60.0
    mask = DenseAndSparse(sensitive=0, rule="quartiles", range_multiplier=0.4).removed(weight, {})
    assert weight[mask].tolist() == [55.0, 56.0, 57.0, 58.0, 59.0, 60.0]
    gaussian = numbers(1000, 1000)
    share = float(DenseAndSparse(rule="quartiles").removed(gaussian, {}).float().mean())
    assert share == pytest.approx(0.004, rel=0.05)


def test_nothing_removed_leaves_the_code() -> None:
    weight = numbers(4, 10)
    correction = DenseAndSparse(outliers=0.0)
    code = UniformGrid().quantize(weight)
    assert correction.correct(weight, code, {}) is code
    assert correction.extra_bytes((4, 10)) == 0


def test_bits_of_values_and_indices_are_counted() -> None:
    correction, shape = DenseAndSparse(), (100, 200)
    weight = numbers(*shape)
    code = UniformGrid().quantize(weight)
    found = correction.correct(weight, code, {"fisher": weight.square()})
    sparse = term(found)
    assert isinstance(sparse, Sparse)
    assert sparse.entries == 10 + 80
    assert found.nbytes - code.nbytes == correction.extra_bytes(shape) == 4 * 101 + 90 * 4


def test_outliers_then_low_rank() -> None:
    """Corrections follow each other: the low-rank term takes what the first two leave."""
    weight = numbers(64, 256)
    corrections: list[Correction] = [DenseAndSparse(outliers=0.01), lorc(4)]
    rest = weight
    for correction in corrections:
        rest, _ = correction.split(rest, {})
    code: Code = UniformGrid(bits=3).quantize(rest)
    errors = [(code.decode() - weight).norm()]
    for correction in corrections:
        code = correction.correct(weight, code, {})
        errors.append((code.decode() - weight).norm())
    assert errors == sorted(errors, reverse=True)
    assert isinstance(code, Sum)
    assert [type(part) for part in code.terms] == [Uniform, Sparse, LowRank]
