"""Factors in the place of a matrix: the truncated decomposition, ROCKET's steps, bytes, codes, packed products."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.factorise import Whitened, balanced, chosen_entries, refitted, root_of
from featherweight.methods.quantize.grids.factors import FactorsGrid, Sizes
from featherweight.methods.recipe import load_recipe, recipe_from
from featherweight.model.products import ready
from featherweight.model.products.pack import pack_code
from featherweight.storage.codes import code_layout
from featherweight.storage.codes.masked import Masked
from featherweight.tasks.compress.refusals import check_recipe

SHAPES = [(40, 24), (24, 40), (32, 32)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(columns: int, seed: int = 1) -> Tensor:
    """[200, in], of unequal and correlated columns."""
    mix = numbers(columns, columns, seed=seed) * torch.logspace(0, 1, columns, dtype=torch.float64)
    return numbers(200, columns, seed=seed + 1) @ mix


def whitened(shape: tuple[int, int], seed: int = 0) -> tuple[Whitened, Tensor]:
    x = inputs(shape[1])
    return Whitened.of(numbers(*shape, seed=seed), root_of(x.T @ x)), x


def test_the_whitened_distance_is_that_of_the_outputs() -> None:
    found, x = whitened((40, 24))
    other = numbers(40, 24, seed=5)
    assert found.root is not None
    outputs = (x @ (found.weight - other).T).norm()
    assert float(((found.weight - other) @ found.root).norm()) == pytest.approx(float(outputs), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_coefficients_are_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    """What is left are the other singular values, and no other matrix of that rank gives better outputs."""
    found, x = whitened(shape)
    singular = torch.linalg.svdvals(found.matrix)
    for rank in (1, 7, 20):
        left, right = found.coefficients[:, :rank], found.unwhitened(found.atoms[:rank])
        missed = float((x @ (found.weight - left @ right).T).norm()) ** 2
        assert missed == pytest.approx(float(singular[rank:].square().sum()), rel=1e-6)
        u, s, v = torch.linalg.svd(found.weight, full_matrices=False)
        plain = (u[:, :rank] * s[:rank]) @ v[:rank]
        for other in (plain, plain + 0.01 * left @ right):
            if torch.linalg.matrix_rank(other) <= rank:
                assert missed <= float((x @ (found.weight - other).T).norm()) ** 2 * (1 + 1e-9)
    assert torch.allclose(found.coefficients @ found.atoms, found.matrix, atol=1e-8 * float(singular[0]))


def test_a_refit_misses_less_and_nothing_along_the_coefficients() -> None:
    found, _ = whitened((40, 24))
    left = found.coefficients[:, :12]
    mask = chosen_entries(left.abs(), 200, 0.005)
    sparse = left * mask
    fitted = refitted(found.matrix, sparse, 0.0)
    assert found.output_error(sparse, fitted) < 0.99 * found.output_error(sparse, found.atoms[:12])
    residual = sparse.T @ (found.matrix - sparse @ fitted)
    assert float(residual.abs().max()) < 1e-9 * float((sparse.T @ found.matrix).abs().max())
    ridged = refitted(found.matrix, sparse, 1e-3)
    assert ridged.norm() < fitted.norm()
    unit = 1e-3 * float((sparse.T @ sparse).diagonal().mean())
    left_hand = (sparse.T @ sparse + unit * torch.eye(12, dtype=torch.float64)) @ ridged
    assert torch.allclose(left_hand, sparse.T @ found.matrix)


def test_an_atom_that_nothing_uses_is_zero() -> None:
    left = numbers(9, 4)
    left[:, 2] = 0
    fitted = refitted(numbers(9, 6, seed=1), left, 1e-3)
    assert torch.equal(fitted[2], torch.zeros(6, dtype=torch.float64))
    assert fitted.isfinite().all()


@pytest.mark.parametrize(("entries", "each"), [(40, 3), (50, 4), (80, 7), (9, 0), (10, 1), (100, 9)])
def test_the_two_stages_keep_exactly_as_many_as_asked(entries: int, each: int) -> None:
    importance = numbers(10, 10).abs() * torch.logspace(0, 3, 10, dtype=torch.float64).unsqueeze(1)
    kept = chosen_entries(importance, entries, 0.05)
    assert int(kept.sum()) == entries
    assert int(kept.sum(1).min()) >= each
    for row in range(10):  # the most important of its row
        count = int(kept[row].sum())
        assert set(kept[row].nonzero().flatten().tolist()) == set(importance[row].topk(count).indices.tolist())


def test_the_second_stage_gives_to_the_best_of_all_rows() -> None:
    importance = torch.tensor([[9.0, 8.0, 7.0, 6.0], [4.0, 3.0, 2.0, 1.0]])
    assert chosen_entries(importance, 4, 0.0).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert chosen_entries(importance, 4, 0.25).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert chosen_entries(torch.ones(2, 4), 5, 0.0).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_golden_values() -> None:
    """By hand, without a second moment: W = diag(3, 1) rotated by nothing, of which one atom is (1, 0)."""
    found = Whitened.of(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), None)
    assert found.atoms.abs().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert torch.allclose(found.coefficients.abs(), torch.tensor([[3.0, 0], [0, 1], [4, 0]], dtype=torch.float64))
    assert found.lengths(2).tolist() == [1.0, 1.0]
    sparse = torch.tensor([[3.0], [0.0], [0.0]], dtype=torch.float64)
    # V'V = 9, V'M = (9, 0), the ridge 0.1 * 9: D = 9 / 9.9
    assert torch.allclose(refitted(found.weight, sparse, 0.1), torch.tensor([[1 / 1.1, 0.0]], dtype=torch.float64))
    left, right = balanced(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.5, 0.0]]))
    assert (left.tolist(), right.tolist()) == ([[2.0], [0.0]], [[2.0, 0.0]])


def test_a_planted_dictionary_is_found() -> None:
    """Orthonormal atoms of distinct energies, coefficients with one entry a row: nothing is missed."""
    atoms = torch.linalg.qr(numbers(24, 6)).Q.T
    left = torch.zeros(60, 6, dtype=torch.float64)
    left[torch.arange(60), torch.arange(60) % 6] = numbers(60, seed=2).abs() + 1
    left *= torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    found = Whitened.of(left @ atoms, None)
    mask = chosen_entries(found.coefficients[:, :6].abs(), 60, 0.0)
    sparse = found.coefficients[:, :6] * mask
    assert found.output_error(sparse, refitted(found.matrix, sparse, 0.0)) < 1e-9 * float(found.matrix.norm())


SETTINGS: list[dict[str, Any]] = [
    {"kappa": 1},
    {"kappa": 1.5},
    {"kappa": 3},
    {"kappa": 2, "count": "values"},
    {"kappa": 1, "dictionary_bits": 8, "value_bits": 8},
    {"kappa": 2, "dictionary_bits": 8, "value_bits": 4},
    {"kappa": 2, "dictionary_bits": 4, "value_bits": 16},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("removed", [0.2, 0.5, 0.8])
def test_bytes_are_never_more_than_the_share_and_little_is_left(settings: dict[str, Any], removed: float) -> None:
    grid = FactorsGrid(removed=removed, **settings)
    for shape in ((256, 160), (160, 256), (96, 640)):
        sizes, (rows, columns) = grid.sizes(shape), shape
        stored = sum(one.nbytes for one in code_layout(grid.spec(shape)).values())
        if grid.count == "values":
            spent, room = sizes.rank * columns + sizes.entries, (1 - removed) * rows * columns
        else:
            spent, room = stored, (1 - removed) * 2 * rows * columns
        assert spent <= room
        full = sizes.rank == min(shape)
        step = 1 if grid.kappa > 1 else 2 * (rows + columns)
        assert full or spent + step + 2 > room
        code = grid.quantize(numbers(*shape).float())
        assert code.spec == grid.spec(shape)
        assert code.nbytes == stored
        if grid.kappa > 1:
            assert isinstance(code.left, Masked)  # type: ignore[attr-defined]
            assert code.left.entries == sizes.entries  # type: ignore[attr-defined]


def test_sizes_by_hand() -> None:
    """r = (1 - removed) out in / (in + out / kappa), as published; and r (out + in) numbers of a low rank."""
    published = FactorsGrid(removed=0.25, kappa=2, count="values").sizes((64, 96))
    assert published.rank == math.floor(0.75 * 64 * 96 / (96 + 64 / 2)) == 36
    assert published.entries == 0.75 * 64 * 96 - 36 * 96
    assert FactorsGrid(removed=0.25, kappa=1).sizes((64, 96)) == Sizes(28, 28 * 64)  # 4608 / 160 = 28.8
    # with places: 2 96 r + 64 r / 8 + 2 64 r / 2 = 264 r of 9216 bytes: 34, and 240 bytes are 120 entries more
    assert FactorsGrid(removed=0.25, kappa=2).sizes((64, 96)) == Sizes(34, 34 * 32 + 120)
    assert FactorsGrid(removed=0.9, kappa=2).sizes((3, 1)) == Sizes(1, 3)  # at least one atom


def test_second_moments_serve_the_outputs() -> None:
    """A layer whose inputs are far from alike; and the moment of inputs alike changes nothing."""
    x = inputs(64)
    weight, gram = numbers(96, 64).float(), (x.T @ x / 200).float()
    for kappa in (1, 2):
        grid = FactorsGrid(removed=0.4, kappa=kappa)
        missed = [
            float(((weight - grid.quantize(weight, statistics).decode()).double() @ x.T).norm())
            for statistics in ({"gram": gram}, {})
        ]
        assert missed[0] < 0.9 * missed[1]
        alike = grid.quantize(weight, {"gram": torch.eye(64) * 4.0}).decode()
        assert torch.allclose(alike, grid.quantize(weight).decode(), atol=3e-3 * float(weight.abs().max()))
    assert FactorsGrid(whitened=False).needs == ()
    plain = FactorsGrid(removed=0.4, whitened=False)
    assert torch.equal(plain.quantize(weight, {"gram": gram}).decode(), plain.quantize(weight).decode())


def test_a_singular_moment_is_damped_until_it_serves() -> None:
    x = inputs(24)[:5]
    code = FactorsGrid(removed=0.3).quantize(numbers(40, 24).float(), {"gram": (x.T @ x).float()})
    assert code.decode().isfinite().all()
    dead = torch.zeros(24, 24)
    assert FactorsGrid(removed=0.3).quantize(numbers(40, 24).float(), {"gram": dead}).decode().isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        FactorsGrid().quantize(numbers(40, 24).float(), {"gram": torch.full((24, 24), math.nan)})


def test_rounded_factors_miss_little_more_at_the_same_sizes() -> None:
    """8 bits cost hardly anything beside what is cut away, 4 more; refits keep it within the square root of two."""
    weight = numbers(128, 96).float()
    errors = []
    for bits in (16, 8, 4):
        # shares for which sizes are about equal
        grid = FactorsGrid(removed=1 - 0.5 * bits / 16, kappa=1, value_bits=bits, dictionary_bits=bits)
        code = grid.quantize(weight)
        errors.append(float((weight - code.decode()).norm() / weight.norm()))
    assert errors[0] < errors[1] * 1.05
    assert errors[1] < 1.05 * errors[0]
    assert errors[2] < 1.5 * errors[0]


def test_other_sizes_use_the_same_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    of = Whitened.of

    def counted(weight: Tensor, root: Tensor | None) -> Whitened:
        made.append(root is not None)
        return of(weight, root)

    monkeypatch.setattr(Whitened, "of", counted)
    weight, gram, options = numbers(40, 24).float(), torch.eye(24), SolveOptions()
    codes = []
    for removed in (0.2, 0.5):
        for statistics in ({"gram": gram}, {}):
            codes.append(FactorsGrid(removed=removed).quantize_source(HeldWeight(weight), options, statistics))
    assert made == [True, False]
    assert torch.equal(codes[2].decode(), FactorsGrid(removed=0.5).quantize(weight, {"gram": gram}).decode())
    FactorsGrid().quantize_source(HeldWeight(weight + 1), options, {"gram": gram})
    assert made == [True, False, True, True]  # the second for the comparison without memo


@pytest.mark.skipif(not ready(), reason="the native library is not built")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_products_never_make_the_matrix(settings: dict[str, Any]) -> None:
    """Against the decoded matrix; no operand is as large as the layer."""
    code = FactorsGrid(removed=0.5, **settings).quantize(numbers(64, 96).float())
    packed = pack_code(code)
    assert not packed.note
    x = numbers(5, 96, seed=3).float()
    expected = x @ code.decode().T
    assert torch.allclose(packed(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert [term.kind for term in packed.terms] == ["low-rank" if settings["kappa"] == 1 else "product"]


def test_only_nearest_goes_with_factors() -> None:
    with pytest.raises(RecipeError, match=r"factors takes a matrix as a whole.*set rounding to nearest"):
        check_recipe(recipe_from({"grid": {"kind": "factors"}, "rounding": {"kind": "hessian"}, "name": "x"}, "x"))
    check_recipe(load_recipe("rocket"))
