"""D2Quant's dual-scale quantiser: monotone sub-steps, its known gains, exact recovery, and the form it is stored in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.methods.quantize.grids.dual_scale import (
    DualScaleGrid,
    DualScales,
    column_step,
    nearest_signs,
    row_step,
    start,
)
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.sweep import SweepSettings, sweep
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.column_scaled import ColumnScaled


def relative(weight: Tensor, found: DualScales) -> float:
    decoded = found.columns * (found.signs @ found.rows.unsqueeze(-1)).squeeze(-1)
    return float((weight - decoded).square().sum() / weight.square().sum())


def planted(seed: int, ratios: tuple[float, ...]) -> Tensor:
    """c (+-r_0 +-r_1 ...) [64, 128] with log-normal c."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(0.3 * torch.randn(64, 1, generator=generator, dtype=torch.float64)) * torch.tensor(ratios).double()
    columns = torch.exp(0.5 * torch.randn(128, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, (64, 128, len(ratios)), generator=generator).double() * 2 - 1
    return columns * (signs @ rows.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_sub_step_raises_the_error(bits: int) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    found = start(weight, bits)
    error = relative(weight, found)
    for _ in range(10):
        for step in (row_step, column_step, nearest_signs):
            found = step(weight, found)
            assert relative(weight, found) <= error + 1e-12
            error = relative(weight, found)


def test_known_gains_over_uniform_grids() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(256, 128, generator=generator)
    scaled = plain * torch.exp(torch.randn(128, generator=generator))

    def error(weight: Tensor, grid: DualScaleGrid | UniformGrid) -> float:
        return float((grid.quantize(weight).decode() - weight).square().sum() / weight.square().sum())

    assert error(plain, DualScaleGrid(bits=2)) == pytest.approx(0.114, abs=0.003)
    assert error(plain, UniformGrid(bits=2, clip="mse")) == pytest.approx(0.137, abs=0.004)
    assert error(plain, UniformGrid(bits=2)) == pytest.approx(0.260, abs=0.012)
    for bits in (2, 3):
        ours = error(scaled, DualScaleGrid(bits=bits))
        assert ours < 0.55 * error(scaled, UniformGrid(bits=bits, clip="mse"))


@pytest.mark.parametrize("seed", range(5))
def test_two_planted_planes_are_recovered_exactly(seed: int) -> None:
    weight = planted(seed, (1.0, 0.45))
    found = start(weight, 2)
    for _ in range(15):
        found = nearest_signs(weight, column_step(weight, row_step(weight, found)))
    assert relative(weight, found) < 1e-20


def test_three_planted_planes_are_recovered_closely() -> None:
    errors = []
    for seed in range(5):
        weight = planted(seed, (1.0, 0.45, 0.2))
        found = start(weight, 3)
        for _ in range(15):
            found = nearest_signs(weight, column_step(weight, row_step(weight, found)))
        errors.append(relative(weight, found))
    assert sorted(errors)[2] < 1e-8
    assert max(errors) < 1e-3


def test_stored_as_planes_with_column_scales() -> None:
    weight = torch.randn(12, 150, generator=torch.Generator().manual_seed(1))
    grid = DualScaleGrid(bits=2, group_size=64)
    code = grid.quantize(weight)
    assert isinstance(code, ColumnScaled)
    assert isinstance(code.inner, BinaryPlanes)
    fit = grid.fit(weight)
    scales, columns = grid.levels(fit), grid.column_scales(fit)
    assert columns is not None
    table = scales.repeat_interleave(64, dim=1)[:, :150] * columns[:150].view(1, -1, 1)
    nearest = table.gather(-1, (weight.unsqueeze(-1) - table).abs().argmin(-1, keepdim=True)).squeeze(-1)
    assert torch.allclose(code.decode(), nearest, rtol=1e-5)
    assert torch.equal(code.decode(), code.inner.decode() * columns[:150])
    # 2 bits, two fp16 scales a row and group (three groups), one fp16 scale a column
    assert code.nbytes == 2 * -(-12 * 150 // 8) + 12 * 3 * 2 * 2 + 150 * 2


def test_dead_columns_and_rows_leave_storable_scales() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 5] = 0
    weight[3] = 0
    for largest in (1.0, 1e-6, 1e6):
        grid = DualScaleGrid(group_size=64)
        fit = grid.fit(weight * largest)
        columns = fit["column_scales"].float()
        assert float(columns.min()) >= 0.999e-3
        assert float(columns.max()) <= 1e3
        decoded = grid.nearest(weight * largest, fit).decode()
        assert torch.equal(decoded[3], torch.zeros(64))
        assert decoded[:, 5].abs().max() <= 2e-3 * decoded.abs().max()
        assert (decoded / largest - weight).norm() < 0.4 * weight.norm()


def correlated(columns: int, seed: int) -> Tensor:
    """A second moment of correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.7 * torch.eye(columns)
    inputs = torch.randn(1500, columns, generator=generator) @ mixing
    inputs *= torch.exp(0.7 * torch.randn(columns, generator=generator))
    return inputs.T @ inputs / 1500


@pytest.mark.parametrize("order", ["none", "activation", "group-aware"])
@pytest.mark.parametrize("groups", ["dynamic", "static"])
def test_a_sweep_honours_the_column_scales_in_every_order(order: str, groups: str) -> None:
    """The sweep's loss is that of the code it returns, in the columns' own order, and below rounding to nearest."""
    weight = torch.randn(24, 150, generator=torch.Generator().manual_seed(3))
    weight *= torch.exp(torch.randn(150, generator=torch.Generator().manual_seed(4)))
    gram = correlated(150, 5)
    grid = DualScaleGrid(bits=2, group_size=64)
    result = sweep(weight, {"gram": gram}, grid, SweepSettings(order=order, groups=groups))  # type: ignore[arg-type]
    damped = gram.double() + result.damping * gram.double().diagonal().mean() * torch.eye(150)

    def loss(decoded: Tensor) -> float:
        missed = (weight - decoded).double()
        return float(((missed @ damped) * missed).sum())

    assert loss(result.code.decode()) == pytest.approx(result.loss, rel=1e-3)
    assert result.loss < loss(grid.quantize(weight).decode())
