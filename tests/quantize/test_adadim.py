"""AdaDim (arXiv 2309.15531): equivariances of both groupings, the choice by output error, GPTQ inside columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, gathered, tiny_model
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.adadim import AdaDim, along_outputs, in_order
from featherweight.methods.quantize.rounding.hessian import Hessian

ROWS = UniformGrid(bits=3, group_size=64, scale_dtype="float32")


def columns(rows: int = 128) -> UniformGrid:
    found = along_outputs(ROWS, rows)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def missed(weight: Tensor, grid: UniformGrid) -> float:
    return float((grid.quantize(weight).decode() - weight).square().sum() / weight.square().sum())


def test_equivariance() -> None:
    weight = random(128, 128)
    factors = 2.0 ** torch.randint(-3, 4, (128,), generator=torch.Generator().manual_seed(1))
    by_column, by_row = columns().quantize(weight).decode(), ROWS.quantize(weight).decode()
    assert torch.equal(columns().quantize(weight * factors).decode(), by_column * factors)
    assert torch.equal(ROWS.quantize(weight * factors.unsqueeze(1)).decode(), by_row * factors.unsqueeze(1))
    assert not torch.equal(ROWS.quantize(weight * factors).decode(), by_row * factors)
    assert not torch.equal(columns().quantize(weight * factors.unsqueeze(1)).decode(), by_column * factors.unsqueeze(1))


def test_scaled_columns_and_rows() -> None:
    """Card, item 2: relative errors about 0.066 and 0.038 for log-normal columns, reversed for rows."""
    weight, factors = random(512, 512), torch.exp(random(512, seed=1))
    grid = along_outputs(ROWS, 512)
    assert grid is not None
    assert missed(weight, ROWS) == pytest.approx(0.038, rel=0.1)
    assert missed(weight, grid) == pytest.approx(0.038, rel=0.1)
    assert missed(weight * factors, grid) == pytest.approx(0.038, rel=0.1)
    assert missed(weight * factors, ROWS) == pytest.approx(0.066, rel=0.2)
    assert missed(weight * factors.unsqueeze(1), ROWS) == pytest.approx(0.038, rel=0.1)
    assert missed(weight * factors.unsqueeze(1), grid) == pytest.approx(0.066, rel=0.2)


def test_a_sensitive_column() -> None:
    """Card, item 3: small weights under a large activation are safe in groups of their own."""
    weight, inputs = random(128, 128), random(512, 128, seed=1)
    weight[:, 9] /= 10
    inputs[:, 9] *= 50
    errors = [float((inputs @ (g.quantize(weight).decode() - weight).T).square().mean()) for g in (ROWS, columns())]
    assert errors[1] < errors[0] / 2


def test_one_group_a_column_has_the_closed_form() -> None:
    weight = random(64, 16)
    grid = UniformGrid(bits=8, group_size=1, axis="output", output_group_size=64, scale_dtype="float32")
    steps = (weight.amax(0).clamp(min=0) - weight.amin(0).clamp(max=0)) / 255
    assert bool(((grid.quantize(weight).decode() - weight).abs() <= steps / 2 * 1.001).all())


def test_sweeps_inside_columns() -> None:
    """Card, item 6: with a diagonal second moment it is round to nearest, with a correlated one it is better."""
    weight, inputs = random(64, 96), random(400, 96, seed=1) @ (torch.eye(96) + 0.4 * random(96, 96, seed=2))
    sweep = Hessian(order="activation", groups="dynamic")
    grid = columns(64)
    plain = grid.quantize(weight).decode()
    diagonal = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.5)
    swept = sweep.quantize_source(HeldWeight(weight), grid, {"gram": diagonal}, SolveOptions())
    assert torch.equal(swept.decode(), plain)
    permuted = sweep.quantize_source(HeldWeight(weight), grid, gathered(inputs), SolveOptions())
    found = in_order(permuted).decode()
    assert torch.equal(found, permuted.decode())
    assert in_order(permuted).spec == grid.quantize(weight).spec
    assert (inputs @ (found - weight).T).square().sum() < 0.8 * (inputs @ (plain - weight).T).square().sum()


@pytest.mark.parametrize("rounding", ["nearest", "hessian"])
def test_a_block(rounding: Any, tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path), spread=1.5)
    for name in session.names[:3]:  # large columns under small activations: groups inside columns are better
        session.set_weight(name, session.weight(name) * torch.exp(1.5 * random(64, seed=3)))
    down = session.names[-1]  # rows of very different size: groups inside rows are better
    session.set_weight(down, session.weight(down) * torch.exp(1.5 * random(64, 1, seed=3)))
    grids = dict.fromkeys(session.names, UniformGrid(bits=3, group_size=32))
    told: list[dict[str, Any]] = []
    before = {name: session.weight(name) for name in session.names}
    choice = AdaDim(rounding=rounding)
    codes = choice.quantize_block(session, grids, session.statistics(), SolveOptions(), told.append)
    axes = {fact["layer"]: fact["axis"] for fact in told}
    assert list(axes) == session.names
    assert set(axes.values()) == {"input", "output"}
    for fact in told:
        both = (fact["error_input"], fact["error_output"])
        assert fact[f"error_{fact['axis']}"] == min(both)
    for name, code in codes.items():
        assert code.spec.get("axis", "input") == axes[name]
        assert torch.equal(session.weight(name), before[name])
        if rounding == "nearest":
            grid = grids[name] if axes[name] == "input" else along_outputs(grids[name], code.shape[0])
            assert grid is not None
            assert torch.equal(code.decode(), grid.quantize(before[name]).decode())


def test_what_cannot_be_grouped_keeps_its_rows(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    grids = dict.fromkeys(session.names, UniformGrid(bits=3, group_size=48))
    codes = AdaDim().quantize_block(session, grids, {}, SolveOptions())
    assert all("axis" not in code.spec for code in codes.values())
    assert along_outputs(UniformGrid(group_size=32), 100) is None
    with pytest.raises(RecipeError, match="uniform"):
        AdaDim().quantize_block(session, dict.fromkeys(session.names, TritPlaneGrid()), {}, SolveOptions())


def test_a_tie_keeps_the_rows(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    name = session.names[0]
    session.set_weight(name, torch.zeros_like(session.weight(name)))
    code = AdaDim().quantize_block(session, {name: UniformGrid(group_size=32)}, {}, SolveOptions())[name]
    assert "axis" not in code.spec
