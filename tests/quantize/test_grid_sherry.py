"""3:4 ternary codes and their fit: brute force, golden figures, bits of the format."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.sherry import SherryGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.storage.codes import code_from
from featherweight.storage.codes.sherry import QUARTETS, Sherry, from_quartets, quartet_codes, to_quartets

PUBLISHED = "A9 89 29 09 A6 86 26 06 9A 92 1A 12 6A 62 4A 42"  # of STQ1_0, positive first weight, 2 bits a lane


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(weight: Tensor, **settings: Any) -> tuple[float, Tensor]:
    """Scale of the first group in float64 and the trits, for a float64 weight."""
    grid = SherryGrid(**settings)
    scales = grid._fit(weight, {}, torch.float64)["scales"]
    return float(scales[0, 0]), from_quartets(QUARTETS[grid._codes(weight, scales, {}).int()], weight.shape[1], 1)


def quartet_errors(weight: Tensor, code: Sherry) -> Tensor:
    return (code.decode() - weight).square().sum(1)


def test_sparse_absmean_is_optimal_by_brute_force() -> None:
    quartets = QUARTETS.double()
    for seed in range(20):
        weight = gaussian(1, 8, seed=seed).double()
        scale, trits = fitted(weight, group_size=8)
        best = math.inf
        for first, second in itertools.product(range(32), range(32)):
            candidate = torch.cat([quartets[first], quartets[second]])
            alpha = float(weight[0] @ candidate) / 6
            if alpha >= 0:
                best = min(best, float((weight[0] - alpha * candidate).square().sum()))
        assert float((weight - scale * trits).square().sum()) == pytest.approx(best, rel=1e-12)


def test_every_quartet_has_one_zero_whatever_comes() -> None:
    for weight in (torch.zeros(2, 16), torch.ones(2, 16), torch.tensor([[0.0, 0.0, 3.0, -3.0] * 4]), gaussian(3, 16)):
        code = SherryGrid(group_size=8).quantize(weight)
        assert isinstance(code, Sherry)
        assert bool(((code.unpack().view(-1, 4) == 0).sum(1) == 1).all())


def test_patterns_are_those_of_the_published_table() -> None:
    bytes_of = ((QUARTETS.long() + 1) << torch.tensor([0, 2, 4, 6])).sum(1)
    assert bytes_of[:16].tolist() == [int(text, 16) for text in PUBLISHED.split()]
    assert (0xAA - bytes_of[:16]).tolist() == bytes_of[16:].tolist()
    assert len({tuple(quartet) for quartet in QUARTETS.tolist()}) == 32
    assert torch.equal(quartet_codes(QUARTETS), torch.arange(32, dtype=torch.uint8))
    for wrong in ([1, 1, 1, 1], [0, 0, 1, 1], [0, 2, 1, 1]):
        with pytest.raises(ValueError, match="exactly one 0"):
            quartet_codes(torch.tensor([wrong]))


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize("columns", [1, 4, 66, 192])
def test_quartets_and_back(stride: int, columns: int) -> None:
    matrix = gaussian(3, columns)
    assert torch.equal(from_quartets(to_quartets(matrix, stride), columns, stride), matrix)


def test_stq1_0_blocks_by_hand() -> None:
    """42 bytes for 256 weights, decoded weight by weight by the rule of the format."""
    weight = gaussian(2, 512)
    code = SherryGrid(group_size=256, lane_stride=16).quantize(weight)
    assert isinstance(code, Sherry)
    assert code.bits_per_weight == 42 * 8 / 256 == 1.3125
    blocks = code.stq1_0_blocks()
    assert blocks.shape == (4, 42)
    table = [int(text, 16) for text in PUBLISHED.split()]
    decoded = code.decode().view(4, 256)
    for block, values in zip(blocks, decoded, strict=True):
        qs, signs, scale = block[:32].tolist(), block[32:40].tolist(), float(block[40:].clone().view(torch.float16))
        for group in range(64):
            entry = table[qs[group >> 1] >> 4 * (group & 1) & 15]
            entry = 0xAA - entry if signs[group >> 3] >> (group & 7) & 1 else entry
            for lane in range(4):
                place = 64 * (group // 16) + group % 16 + 16 * lane
                assert float(values[place]) == ((entry >> 2 * lane & 3) - 1) * scale
    with pytest.raises(ValueError, match="STQ1_0 needs"):
        SherryGrid(group_size=256).quantize(weight).stq1_0_blocks()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "scale", "error"), [(16, 0.66828141, 0.44882102), (128, 0.80746413, 0.46421981)])
def test_golden_figures(count: int, scale: float, error: float) -> None:
    weight = torch.tensor(
        [[math.sin(1.7 * j + 0.3 * j * j) + 0.5 * math.cos(2.9 * j) for j in range(1, count + 1)]], dtype=torch.float64
    )
    found, trits = fitted(weight, group_size=count)
    assert found == pytest.approx(scale, abs=1e-8)
    assert float((weight - found * trits).norm() / weight.norm()) == pytest.approx(error, abs=1e-8)


def test_gaussian_relative_error() -> None:
    weight = gaussian(512, 1024)
    code = SherryGrid().quantize(weight)
    assert float((code.decode() - weight).norm() / weight.norm()) == pytest.approx(0.531, abs=0.002)
    assert code.bits_per_weight == 1.25 + 16 / 128


def test_importance_lowers_the_weighted_error_round_by_round() -> None:
    weight, squares = gaussian(64, 256), torch.rand(256, generator=torch.Generator().manual_seed(2)) ** 4 + 1e-3
    statistics = {"gram": squares.diag()}

    def error(grid: SherryGrid) -> float:
        missed = grid.quantize(weight, statistics).decode() - weight
        return float((missed.square() * squares).sum())

    errors = [error(SherryGrid(importance="activations", rounds=r, scale_dtype="float32")) for r in (1, 2, 3, 10)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[2] < 0.98 * error(SherryGrid(scale_dtype="float32"))
    assert SherryGrid(importance="activations").needs == ("gram",)
    assert SherryGrid().needs == ()


@pytest.mark.parametrize("stride", [1, 16])
@pytest.mark.parametrize("columns", [3, 64, 200])
def test_vectors_are_rounded_as_the_whole(stride: int, columns: int) -> None:
    grid = SherryGrid(group_size=64, lane_stride=stride)  # type: ignore[arg-type]
    weight = gaussian(6, columns)
    fit, size = grid.fit(weight), grid.columns_jointly
    padded = torch.nn.functional.pad(weight, (0, -columns % size))
    windows = [grid.round_vectors(padded[:, j : j + size], j, fit) for j in range(0, columns, size)]
    parts = {"codes": torch.cat([part["codes"] for _, part in windows], 1)}
    code, whole = grid.join_vectors(parts, fit, (6, columns)), grid.quantize(weight)
    assert torch.equal(torch.cat([values for values, _ in windows], 1)[:, :columns], whole.decode())
    assert all(torch.equal(t, whole.tensors()[name]) for name, t in code.tensors().items())
    assert torch.equal(code_from(code.spec, code.tensors()).decode(), whole.decode())
    for first, last in ((0, 1), (1, 4), (5, 6)):
        assert torch.equal(whole.decode_rows(first, last), whole.decode()[first:last])


def test_sweep_helps() -> None:
    inputs = gaussian(1024, 64, seed=5) @ gaussian(64, 64, seed=6)
    gram, weight = inputs.T @ inputs / 1024, gaussian(64, 64)
    statistics = {"gram": gram, "tokens": torch.tensor([1024])}

    def error(decoded: Tensor) -> float:
        return float((((decoded - weight) @ gram) * (decoded - weight)).sum())

    grid = SherryGrid(group_size=32)
    swept = Hessian().quantize_source(HeldWeight(weight), grid, statistics, SolveOptions())
    assert error(swept.decode()) < 0.9 * error(grid.quantize(weight).decode())


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        SherryGrid(group_size=6)
    with pytest.raises(ValidationError, match="multiple of 64"):
        SherryGrid(group_size=32, lane_stride=16)
