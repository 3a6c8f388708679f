"""Uniform grids against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch

from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.storage.codes.uniform import Uniform


def test_asymmetric_min_max_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    code = UniformGrid(bits=2, group_size=4, scale_dtype="float32").quantize(weight)
    assert isinstance(code, Uniform)
    codes, zero_points = code.unpack()
    assert code.scales.tolist() == [[1.0]]  # (2 + 1) / 3
    assert zero_points.tolist() == [[1]]
    assert codes.tolist() == [[0, 1, 1, 3]]  # 0.5 is a tie, rounded to even
    assert code.decode().tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_symmetric_by_hand() -> None:
    weight = torch.tensor([[-1.5, 0.4, 0.6, 1.5]])
    code = UniformGrid(bits=2, symmetric=True, group_size=4, scale_dtype="float32").quantize(weight)
    assert isinstance(code, Uniform)
    assert code.zero_points is None
    assert code.scales.tolist() == [[1.0]]  # 2 x 1.5 / 3
    assert code.decode().tolist() == [[-2.0, 0.0, 1.0, 1.0]]  # levels -2, -1, 0, 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_half_a_step_inside_the_range(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 192)
    grid = UniformGrid(bits=bits, symmetric=symmetric, group_size=64, scale_dtype="float32")
    code = grid.quantize(weight)
    step = code.tensors()["scales"].repeat_interleave(64, dim=1)

    # rounding misses by half a step; clamping by another half: the range ends half a step inside the extremes at worst
    assert torch.all((code.decode() - weight).abs() <= step + 1e-6)


def test_ranges_of_one_sign_keep_zero_a_level() -> None:
    weight = torch.rand(3, 128) + 5
    grid = UniformGrid(bits=4)
    assert torch.all((grid.levels(grid.fit(weight)) == 0).any(-1))
    assert torch.all((grid.levels(grid.fit(-weight)) == 0).any(-1))


def test_mse_clip_is_the_best_of_all_shares() -> None:
    weight = torch.randn(4, 64)
    grid = UniformGrid(bits=3, group_size=64, clip="mse", scale_dtype="float32")
    found = ((grid.quantize(weight).decode() - weight) ** 2).sum(1)
    best = torch.full((4,), torch.inf)
    for share in [1 - i / 100 for i in range(80)]:
        low, high = weight.amin(1) * share, weight.amax(1) * share
        scale = ((high - low) / 7).unsqueeze(1)
        zero = (-low.unsqueeze(1) / scale).round()
        decoded = ((weight / scale).round() + zero).clamp(0, 7).sub(zero) * scale
        best = torch.minimum(best, ((decoded - weight) ** 2).sum(1))
    assert torch.allclose(found, best, rtol=1e-5)


def test_gaussian_errors_are_the_known_ones() -> None:
    """Round to nearest on Gaussian data, groups of 128: .213 at 3 bits, .099 at 4 (known to .002; an integer zero point
    shifts the range by up to half a step, which costs a little more)."""
    weight = torch.randn(1000, 128)
    for bits, expected in ((3, 0.213), (4, 0.099)):
        error = (UniformGrid(bits=bits).quantize(weight).decode() - weight).norm() / weight.norm()
        assert float(error) == pytest.approx(expected, abs=0.004)
