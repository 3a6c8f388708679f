"""BitStack: energies that blocks leave, nesting, bytes, scaling, on small matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.methods.quantize.grids.sign_factor import SignFactorGrid
from featherweight.methods.quantize.transforms.channel_norms import ChannelNorms, scales_of
from featherweight.methods.recipe import load_recipe
from featherweight.storage.codes import Code, code_layout
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.sign_factor import SignFactor
from featherweight.storage.codes.sum import Sum


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def energies(weight: Tensor, code: Code, blocks: int) -> list[float]:
    """|R_i|^2 / |W|^2 after each block."""
    whole = weight.double()
    return [
        float((whole - code.prefix(i + 1).decode().double()).square().sum() / whole.square().sum())
        for i in range(blocks)
    ]


@pytest.mark.parametrize("shape", [(96, 64), (64, 200), (530, 540)], ids=str)
def test_a_block_leaves_what_lies_behind_its_rank(shape: tuple[int, int]) -> None:
    """Signs cancel: |R_i|^2 is the sum of the squared singular values of |R_{i-1}| beyond k."""
    weight = gaussian(*shape)
    code = SignFactorGrid(blocks=3, rank=6).quantize(weight)
    rest = weight.double()
    for i in range(3):
        values = torch.linalg.svdvals(rest.abs())
        expected = float(values[6:].square().sum())
        before = float(rest.square().sum())
        rest = weight.double() - code.prefix(i + 1).decode().double()
        assert float(rest.square().sum()) == pytest.approx(expected, rel=2e-3)
        assert float(rest.square().sum()) < before


def test_full_rank_is_the_matrix() -> None:
    weight = gaussian(12, 30)
    code = SignFactorGrid(blocks=1, rank=30).quantize(weight)
    assert isinstance(code, SignFactor)
    assert torch.allclose(code.decode(), weight, atol=2e-3)  # the factors are float16


def test_energies_of_a_gaussian_matrix_with_and_without_signs() -> None:
    """Those of the card; the plain singular values have as many bytes."""
    weight = gaussian(512, 512)
    signed, plain = (SignFactorGrid(blocks=6, rank=16, signs=signs).quantize(weight) for signs in (True, False))
    assert plain.nbytes == pytest.approx(signed.nbytes, rel=1e-3)
    expected = (0.323, 0.105, 0.039, 0.017, 0.0086, 0.0049)
    assert energies(weight, signed, 6) == pytest.approx(expected, rel=0.03)
    assert energies(weight, plain, 6) == pytest.approx((0.79, 0.63, 0.49, 0.38, 0.29, 0.21), rel=0.03)


def test_residuals_of_stored_factors_miss_less() -> None:
    weight = gaussian(64, 96) * 3
    stored, published = (SignFactorGrid(blocks=8, rank=12, residual=r).quantize(weight) for r in ("stored", "float"))
    assert energies(weight, stored, 8)[-1] < energies(weight, published, 8)[-1]
    assert torch.equal(stored.prefix(1).decode(), published.prefix(1).decode())


def test_levels_are_nested_bit_for_bit() -> None:
    code = ColumnScaled(SignFactorGrid(blocks=4, rank=5).quantize(gaussian(20, 34)), gaussian(34).abs().half())
    assert isinstance(code.inner, Sum)
    total = torch.zeros(20, 34)
    for level, block in enumerate(code.inner.terms, 1):
        total = block.decode() if level == 1 else total + block.decode()
        assert torch.equal(code.prefix(level).decode(), total * code.column_scales.float())


def test_bytes_and_bits_of_a_block() -> None:
    spec = SignFactorGrid(blocks=1, rank=16).spec((4096, 4096))
    nbytes = sum(entry.nbytes for entry in code_layout(spec).values())
    assert 8 * nbytes / 4096**2 == 1 + 16 * 16 * 8192 / 4096**2 == 1.125
    odd = SignFactorGrid(blocks=1, rank=2).quantize(gaussian(3, 7))
    assert odd.nbytes == 2 * 2 + 2 * 2 * 10  # 21 signs in two pairs of bytes


def test_zeros_have_the_sign_plus() -> None:
    weight = gaussian(16, 16)
    weight[3] = 0
    code = SignFactorGrid(blocks=1, rank=2).quantize(weight)
    assert isinstance(code, SignFactor)
    assert torch.all(code.unpack()[3] == 1)


@pytest.mark.parametrize("std", [1e-12, 1e-3, 1e6])
def test_factors_that_do_not_fit_float16_are_wider(std: float) -> None:
    weight = gaussian(64, 64) * std
    code = SignFactorGrid(blocks=2, rank=8).quantize(weight)
    assert energies(weight, code, 2) == pytest.approx(
        energies(gaussian(64, 64), SignFactorGrid(blocks=2, rank=8).quantize(gaussian(64, 64)), 2), rel=1e-2
    )


def test_scaling_by_norms_misses_less_of_the_output() -> None:
    weight, sizes = gaussian(64, 96), gaussian(96, seed=5).mul(1.5).exp()
    transform = ChannelNorms().for_layer(weight, {"mean_square": sizes.square()}, 0)
    grid = SignFactorGrid(blocks=2, rank=8)
    scaled = transform.wrap(grid.quantize(transform.apply(weight)))
    plain = grid.quantize(weight)

    def missed(code: Code) -> float:
        return float(((weight - code.decode()) * sizes).norm() / (weight * sizes).norm())

    assert missed(scaled) < 0.75 * missed(plain)
    assert torch.allclose(transform.invert(transform.apply(weight.double())), weight.double(), rtol=1e-12)
    x = gaussian(7, 96).double()
    assert torch.allclose(transform.inputs(x) @ transform.apply(weight.double()).T, x @ weight.double().T, rtol=1e-5)


def test_scales_are_usable_whatever_is_known() -> None:
    scales = scales_of(torch.tensor([0.0, 1.0, float("nan"), 1e30, 1e-30]), 2.2e-5)
    assert bool((scales > 0).all())
    assert bool(scales.isfinite().all())
    assert torch.equal(scales_of(torch.zeros(3)), torch.ones(3, dtype=torch.float64))


def test_presets_have_equal_bytes() -> None:
    one, other = (
        sum(entry.nbytes for entry in code_layout(load_recipe(name).grid.spec((4096, 4096))).values())
        for name in ("bitstack", "bitstack-svd")
    )
    assert one == other
