"""One-plane baselines: closed forms, known Gaussian figures, the exact scale against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from featherweight.methods.quantize.grids.ternary import TernaryGrid
from featherweight.storage.codes.trit_planes import TritPlanes


def quantized(weight: torch.Tensor, scaling: str, group_size: int = 128) -> TritPlanes:
    code = TernaryGrid(scaling=scaling, group_size=group_size, scale_dtype="float32").quantize(weight)  # type: ignore[arg-type]
    assert isinstance(code, TritPlanes)
    return code


def test_scales_by_hand() -> None:
    weight = torch.tensor([[1.0, -0.1, -2.0, 0.3]])
    assert quantized(weight, "absmean").scales.item() == pytest.approx(0.85)
    assert quantized(weight, "twn").scales.item() == pytest.approx(1.5)  # threshold 0.6375: 1 and 2 are above
    assert quantized(weight, "optimal").scales.item() == pytest.approx(1.5)  # 9 / 2 > 10.89 / 3
    assert quantized(weight, "absmean").unpack().tolist() == [[[1, 0, -1, 0]]]


def test_gaussian_figures() -> None:
    weight = torch.randn(8000, 128, generator=torch.Generator().manual_seed(0))
    for scaling, expected in (("absmean", 0.511), ("twn", 0.4335), ("optimal", 0.433)):
        code = quantized(weight, scaling)
        assert float((code.decode() - weight).norm() / weight.norm()) == pytest.approx(expected, abs=0.002)
    whole = quantized(weight.view(1, -1), "absmean", 1 << 30)  # one scale for all of it, as in BitNet
    assert float((whole.decode() - weight.view(1, -1)).norm() / weight.norm()) == pytest.approx(0.513, abs=0.002)
    assert float((whole.unpack() == 0).float().mean()) == pytest.approx(0.310, abs=0.002)


def test_optimal_is_the_best_over_all_trits() -> None:
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    trits = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=7)))[: 3**7 // 2]  # all but zero, up to sign
    scales = weight @ trits.T / trits.square().sum(1)
    best = ((weight.unsqueeze(1) - scales.unsqueeze(-1) * trits) ** 2).sum(-1).amin(1)
    found = ((quantized(weight, "optimal", 7).decode() - weight) ** 2).sum(1)
    assert torch.allclose(found, best, rtol=1e-5)


def test_half_a_scale_rounds_to_zero_on_both_sides() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5]])  # mean 1: halves are ties
    assert quantized(weight, "absmean").unpack().tolist() == [[[0, 0, 1, -1]]]


def test_a_short_last_group_is_not_diluted_by_padding() -> None:
    weight = torch.cat([torch.randn(3, 128), torch.full((3, 5), 0.7)], 1)
    for scaling in ("absmean", "twn", "optimal"):
        assert quantized(weight, scaling).scales[:, 1].flatten().tolist() == pytest.approx([0.7] * 3)
