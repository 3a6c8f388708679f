"""Equilibration: the closed form, what it does not depend on, where its scales go, and that it helps rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, tiny_model
from torch import Tensor

from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.sweep import sweep
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.methods.quantize.transforms.equilibration import SPREAD, Equilibration, equilibrating
from featherweight.methods.recipe import load_recipe
from featherweight.tasks.compress.refusals import check_recipe


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the closed form ----


@pytest.mark.parametrize("exponent", [0.0, 0.125, 0.25, 0.5])
def test_scales_are_the_formula_up_to_a_common_factor(exponent: float) -> None:
    weight, inputs = random(5, 4), random(30, 4, seed=1)
    found = equilibrating(inputs.square().mean(0), weight.square().sum(0), exponent).tolist()
    for i in range(4):
        for j in range(4):
            power = sum(float(x) ** 2 for x in inputs[:, i]) / sum(float(x) ** 2 for x in inputs[:, j])
            size = sum(float(w) ** 2 for w in weight[:, i]) / sum(float(w) ** 2 for w in weight[:, j])
            assert found[i] / found[j] == pytest.approx(power**exponent / size ** (0.5 - exponent), rel=1e-9)
    product = 1.0
    for scale in found:
        product *= scale
    assert product == pytest.approx(1)


def test_a_quarter_balances_columns_and_inputs() -> None:
    """a = 1/4 is the rescaling after which E x_j^2 and |W_:j|^2 are in the same proportion for all channels."""
    weight, inputs = random(6, 9), random(40, 9, seed=1) * random(9, seed=2).exp()
    scales = equilibrating(inputs.square().mean(0), weight.square().sum(0), 0.25)
    ratio = (inputs / scales).square().mean(0) / (weight * scales).square().sum(0)
    assert torch.allclose(ratio, ratio[:1].expand(9), rtol=1e-9)


@pytest.mark.parametrize("exponent", [0.125, 0.25])
def test_units_of_channels_and_of_everything_do_not_matter(exponent: float) -> None:
    weight, inputs, units = random(6, 9), random(40, 9, seed=1), random(9, seed=2).exp()

    def scaled(weight: Tensor, inputs: Tensor) -> Tensor:
        return weight * equilibrating(inputs.square().mean(0), weight.square().sum(0), exponent)

    plain = scaled(weight, inputs)
    other = scaled(weight / units, inputs * units)
    assert torch.allclose(other / other[0, 0], plain / plain[0, 0], rtol=1e-9)
    assert torch.allclose(scaled(weight * 3, inputs * 1e-6), plain * 3, rtol=1e-9)


def test_dead_inputs_and_columns_of_zeros() -> None:
    power, norms = torch.tensor([4.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    found = equilibrating(power, norms, 0.25)
    assert found[1] == found[2]  # a dead input counts as the weakest live one
    assert float(found[0] / found[2]) == pytest.approx(4**0.25)
    assert found[3:].tolist() == [1.0, 1.0]
    assert equilibrating(torch.zeros(3), torch.ones(3), 0.25).tolist() == [1.0] * 3
    assert equilibrating(torch.ones(3), torch.zeros(3), 0.25).tolist() == [1.0] * 3
    far = equilibrating(torch.tensor([1e-30, 1e30]), torch.ones(2), 0.5)
    assert far.tolist() == [1 / SPREAD, SPREAD]


# ---- where the scales go ----


def session_of(folder: Path, family: str = "llama", heads: int = 4) -> TinyBlock:
    return TinyBlock(*tiny_model(folder, family, torch.float32, num_key_value_heads=heads))


def transformed(session: TinyBlock, told: list[dict[str, Any]] | None = None, **how: Any) -> dict[str, Any]:
    grids = dict.fromkeys(session.names, UniformGrid(bits=3, group_size=32))
    notify = (told if told is not None else []).append
    return Equilibration(**how).transform_block(
        session, session.names, grids, session.statistics(), SolveOptions(), notify
    )


@pytest.mark.parametrize(("heads", "stored"), [(4, set()), (2, {"o_proj"})])
def test_the_function_stays_and_what_can_be_folded_is(heads: int, stored: set[str], tmp_path: Path) -> None:
    session = session_of(tmp_path, heads=heads)
    before = {name: session.weight(name) for name in session.names}
    found = transformed(session)
    assert {session.layers[name].role for name in found} == stored
    with torch.no_grad():
        for i, target in enumerate(session.targets):
            assert torch.allclose(session.run(session.inputs[i], i), target, rtol=1e-3, atol=1e-4)
    queries, keys = session.groups[0][:2]
    ratios = [session.weight(name) / before[name] for name in (queries, keys)]
    assert torch.allclose(ratios[0][0], ratios[1][0], rtol=1e-4)  # one s for all that share an input
    assert not torch.allclose(ratios[0][0], torch.ones(64), rtol=0.01)


def test_the_folded_scales_are_those_of_the_stacked_weights(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    group = session.groups[0]
    before, statistics = {name: session.weight(name) for name in group}, session.statistics()
    transformed(session)
    stacked = torch.cat([before[name] for name in group]).double()
    power = statistics[group[0]]["gram"].diagonal().double()
    expected = (power / stacked.square().sum(0)) ** 0.25
    found = (session.weight(group[0]) / before[group[0]]).mean(0).double()
    assert torch.allclose(
        found / found[0], expected / expected[0], rtol=0.02
    )  # the norm's weight is stored in bfloat16


def test_scales_of_ones_own_are_stored(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    before = {name: session.weight(name) for name in session.names}
    found = transformed(session, shared=False)
    assert set(found) == set(session.names)
    assert not session.changed
    queries, keys = session.groups[0][:2]
    assert not torch.allclose(found[queries].scales, found[keys].scales, rtol=0.01)
    for name, chosen in found.items():
        assert isinstance(chosen, ColumnScale)
        assert torch.equal(session.weight(name), before[name])
        code = chosen.wrap(DenseGrid(dtype="float32").quantize(chosen.apply(before[name])))
        assert torch.allclose(code.decode(), before[name], rtol=1e-6)
        assert code.nbytes - 4 * before[name].numel() == Equilibration(shared=False).extra_bytes(
            tuple(before[name].shape)
        )


def test_where_nothing_absorbs_them_scales_are_stored(tmp_path: Path) -> None:
    """Gemma's norms multiply by 1 + weight, which no division of the weight divides."""
    model, anatomy = tiny_model(tmp_path, "gemma")
    for layer in anatomy.layers:  # so large that what the block adds to its input counts
        model.get_submodule(layer.name).weight.data.mul_(20)
    session = TinyBlock(model, anatomy)
    before = session.weight(session.groups[0][0])
    found = transformed(session)
    assert set(session.groups[0]) <= set(found)
    assert torch.equal(session.weight(session.groups[0][0]), before)
    with torch.no_grad():
        assert torch.allclose(session.run(session.inputs[0], 0), session.targets[0], rtol=1e-3, atol=1e-3)


def test_inputs_that_are_not_finite_are_left_alone(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    told: list[dict[str, Any]] = []
    statistics = session.statistics()
    for name in session.groups[0]:
        statistics[name] = statistics[name] | {"gram": torch.full((64, 64), torch.nan)}
    grids = dict.fromkeys(session.names, UniformGrid(bits=3, group_size=32))
    found = Equilibration(shared=False).transform_block(
        session, session.names, grids, statistics, SolveOptions(), told.append
    )
    assert set(found) == set(session.names) - set(session.groups[0])
    assert [fact["skipped"] for fact in told] == ["the inputs' second moment is not finite"] * len(session.groups[0])
    assert Equilibration().transform_block(session, session.names, grids, {}, SolveOptions()) == {}


# ---- what it is for ----


@pytest.mark.parametrize("feedback", [False, True])
def test_unequal_channels_are_rounded_with_less_error(feedback: bool) -> None:
    """A few loud inputs, and loud columns of weights elsewhere."""
    weight, inputs = random(64, 128).float(), random(1024, 128, seed=1).float()
    inputs[:, [3, 50, 99]] *= 30
    weight[:, [10, 70]] *= 5
    gram = inputs.T @ inputs / len(inputs)
    grid = UniformGrid(bits=3, group_size=128)

    def missed(scales: Tensor) -> float:
        scaled, moment = weight * scales, gram / scales / scales[:, None]
        code = sweep(scaled, {"gram": moment}, grid, Hessian()).code if feedback else grid.quantize(scaled)
        error = code.decode() - scaled
        return float(((error @ moment) * error).sum())

    scales = equilibrating(gram.diagonal(), weight.square().sum(0), 0.125 if feedback else 0.25).float()
    assert missed(scales) < 0.6 * missed(torch.ones(128))


def test_a_recipe_may_have_it() -> None:
    recipe = load_recipe(
        {"name": "even", "transforms": [{"kind": "equilibration", "exponent": 0.125}],
         "grid": {"kind": "uniform"}, "rounding": {"kind": "hessian"}}
    )  # fmt: skip
    check_recipe(recipe)
    assert recipe.needs == ("gram",)
