"""AWQ (arXiv 2306.00978) and QuantLRM (arXiv 2602.02581): the search, folding, clipping, importance maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_network import TinyBlock, gathered, tiny_model

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.scale_search import (
    Unit,
    averaged,
    clamped,
    clip_bounds,
    fold,
    layer_loss,
    scaled_weight,
    scales_from,
    search,
    unit_of,
)
from featherweight.methods.quantize.transforms.awq import Awq, Clipped
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.methods.quantize.transforms.quantlrm import QuantLrm, channel_importance, two_parabolas, update_range

THREE_BITS = UniformGrid(bits=3, group_size=128)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(folder: Path, dtype: torch.dtype = torch.float32, heads: int = 2, **overrides: Any) -> TinyBlock:
    return TinyBlock(*tiny_model(folder, dtype=dtype, num_key_value_heads=heads, **overrides))


@pytest.mark.parametrize("key_value_heads", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_folding_keeps_the_function(family: str, key_value_heads: int, tmp_path: Path) -> None:
    model, anatomy = tiny_model(tmp_path, family, torch.float64, num_key_value_heads=key_value_heads)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.3 * random(*parameter.shape).double())
    session = TinyBlock(model, anatomy, spread=0.3)
    for group in session.groups:
        unit = unit_of(session, group)
        assert unit.absorbed
        columns = session.layers[group[0]].shape[1]
        scales = torch.exp(random(columns, seed=columns))
        if unit.producer and session.layers[unit.producer].shape[0] != columns:
            scales = averaged(scales, session.layers[unit.producer].shape[0], 4 // key_value_heads, 16)
        used = fold(session, unit, scales, 16)
        assert used is not None
        assert torch.allclose(used, scales.double(), rtol=0.01)
    with torch.no_grad():
        found = session.run(session.inputs[0], 0)
    assert not torch.equal(found, session.targets[0])
    assert torch.allclose(found, session.targets[0], rtol=1e-11, atol=1e-11)


def test_a_fold_that_changes_the_function_is_undone(tmp_path: Path) -> None:
    """Gemma's norms multiply by 1 + weight: dividing the weight is not a division of the output."""
    model, anatomy = tiny_model(tmp_path, "gemma")
    session = TinyBlock(model, anatomy)
    unit = unit_of(session, session.groups[0])
    before = {name: session.weight(name) for name in session.names}
    assert fold(session, unit, torch.exp(random(64))) is None
    assert unit.norm
    assert all(torch.equal(session.weight(name), weight) for name, weight in before.items())
    with torch.no_grad():
        assert torch.equal(session.run(session.inputs[0], 0), session.targets[0])


def test_a_norm_with_other_readers_is_not_scaled(tmp_path: Path) -> None:
    session = block(tmp_path)
    queries, keys, _ = session.groups[0]
    assert unit_of(session, session.groups[0]).norm == "model.layers.0.input_layernorm.weight"
    assert not unit_of(session, [queries, keys]).absorbed


@pytest.mark.parametrize(("factor", "at_most"), [(100, 0.25), (10, 0.75)])
def test_outlier_channels(factor: float, at_most: float) -> None:
    """Card, item 3: three of 256 channels many times larger; and alpha = 0 is round to nearest, exactly."""
    weight, inputs = random(256, 256), random(2048, 256, seed=1)
    inputs[:, [5, 100, 200]] *= factor
    found = gathered(inputs)
    best = search(
        {"w": weight}, {"w": THREE_BITS}, found["mean_abs"], layer_loss({"w": weight}, found["gram"]), 20, True
    )
    plain = THREE_BITS.quantize(weight).decode()
    assert best.start == layer_loss({"w": weight}, found["gram"])({"w": plain})
    assert best.loss <= at_most * best.start
    if factor == 100:
        assert best.alpha is not None
        assert 0.2 <= best.alpha <= 0.5
        protected = search_protected(weight, inputs, plain, found["mean_abs"].topk(3).indices)
        by_weight = search_protected(weight, inputs, plain, weight.norm(dim=0).topk(3).indices)
        assert protected < 0.5 * by_weight  # card, item 6


def search_protected(weight: torch.Tensor, inputs: torch.Tensor, plain: torch.Tensor, kept: torch.Tensor) -> float:
    mixed = plain.clone()
    mixed[:, kept] = weight[:, kept]
    return float((inputs @ (mixed - weight).T).square().mean())


def test_equal_channels_gain_nothing() -> None:
    weight, found = random(64, 128), gathered(torch.eye(128) * 3)
    best = search(
        {"w": weight}, {"w": THREE_BITS}, found["mean_abs"], layer_loss({"w": weight}, found["gram"]), 20, True
    )
    assert best.alpha is None
    assert best.loss == best.start


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0, 0.95))
def test_the_unit_of_activations_does_not_matter(factor: float, alpha: float) -> None:
    importance = random(128).abs() + 0.1
    one, other = scales_from(importance, alpha, True), scales_from(importance * factor, alpha, True)
    assert torch.allclose(one, other, rtol=1e-4)
    assert float(one.max() * one.min()) == pytest.approx(1, rel=1e-4)


def test_clip_bounds_are_those_of_a_scan() -> None:
    weight, inputs = random(3, 40), random(64, 40, seed=2)
    weight[0, 3], weight[1, 20] = 6.0, -5.0
    grid = UniformGrid(bits=3, group_size=16)
    bounds = clip_bounds(weight, inputs, grid)
    for row in range(3):
        for group in range(3):
            part = slice(16 * group, min(40, 16 * group + 16))
            values, x = weight[row : row + 1, part], inputs[:, part]
            tried = [float(values.abs().max()) * (1 - i / 20) for i in range(10)]
            errors = []
            for bound in tried:
                missed = grid.quantize(values.clamp(-bound, bound)).decode() - values
                errors.append(float((x @ missed.T).square().mean()))
            chosen = float(bounds[row, group])
            assert errors[min(range(10), key=lambda i: abs(tried[i] - chosen))] <= min(errors) * (1 + 1e-4)
            assert errors[0] == pytest.approx(float((x @ (grid.quantize(values).decode() - values).T).square().mean()))
    assert bool((bounds[:2].amin(1) < weight[:2].abs().amax(1)).all())
    assert torch.equal(clamped(weight, torch.full((3, 3), 10.0), 16), weight)


@pytest.mark.parametrize("key_value_heads", [2, 4])
@pytest.mark.parametrize("grouped", ["skip", "average", "store"])
def test_a_block(grouped: str, key_value_heads: int, tmp_path: Path) -> None:
    """The block's float function stays; the scaled and rounded block is nearer to it than round to nearest."""
    session = block(tmp_path, heads=key_value_heads)
    grid = UniformGrid(bits=3, group_size=32)
    grids = dict.fromkeys(session.names, grid)
    plain = error(session, {name: grid.quantize(session.weight(name)).decode() for name in session.names})
    told: list[dict[str, Any]] = []
    transform = Awq(grouped_queries=grouped)
    found = transform.transform_block(session, session.names, grids, session.statistics(), SolveOptions(), told.append)
    with torch.no_grad():
        for i, target in enumerate(session.targets):
            assert torch.allclose(session.run(session.inputs[i], i), target, rtol=1e-3, atol=1e-4)
    codes = {}
    for name in session.names:
        chosen = found.get(name)
        assert isinstance(chosen, Clipped) == (session.layers[name].role not in ("q_proj", "k_proj"))
        weight = session.weight(name)
        codes[name] = chosen.wrap(grid.quantize(chosen.apply(weight))) if chosen else grid.quantize(weight)
    assert error(session, {name: code.decode() for name, code in codes.items()}) < 0.95 * plain
    stored = [name for name, chosen in found.items() if isinstance(chosen, Clipped) and chosen.inner]
    assert len(stored) == int(grouped == "store" and key_value_heads == 2)
    assert any("skipped" in fact for fact in told) == (grouped == "skip" and key_value_heads == 2)
    assert all(fact["loss"] <= fact["rtn"] for fact in told if "loss" in fact)


def error(session: TinyBlock, weights: dict[str, torch.Tensor]) -> float:
    with torch.no_grad(), session.overridden(weights):
        outputs = [session.run(hidden, i) for i, hidden in enumerate(session.inputs)]
    return sum(float((o - t).square().sum()) for o, t in zip(outputs, session.targets, strict=True))


def test_where_nothing_absorbs_the_scales_are_stored(tmp_path: Path) -> None:
    model, anatomy = tiny_model(tmp_path, "gemma")
    session = TinyBlock(model, anatomy)
    grid = UniformGrid(bits=3, group_size=32)
    grids = dict.fromkeys(session.names, grid)
    found = Awq(clip=False).transform_block(session, session.names, grids, session.statistics(), SolveOptions())
    assert any(isinstance(chosen, ColumnScale) for chosen in found.values())
    assert not session.changed or all(torch.equal(session.tensor(n), v) for n, v in session.changed.items())
    assert Awq(clip=False, unabsorbed="skip").transform_block(
        session, session.names, grids, session.statistics(), SolveOptions()
    ) == {}  # fmt: skip


# QuantLRM ----------------------------------------------------------------------------------------


def test_two_parabolas() -> None:
    x = torch.linspace(0.1, 0.9, 101)
    y = two_parabolas(x, 0.1, 0.5, 0.9)
    assert y[0] == pytest.approx(10)
    assert y[-1] == pytest.approx(10)
    assert y[50] == pytest.approx(1, abs=1e-5)
    assert torch.all(y[:51].diff() <= 1e-6)
    assert torch.all(y[50:].diff() >= -1e-6)
    assert torch.allclose(y, y.flip(0), atol=1e-4)
    assert two_parabolas(torch.zeros(1), 0.1, 0.5, 0.9).item() == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1000))
def test_the_range_of_updates_is_that_of_all_together(count: int, seed: int) -> None:
    parts = [random(count, 3, seed=seed).abs() * 10.0**e for e in (-6, 0, 3)] + [torch.zeros(4, 4)]
    whole = torch.cat([part.flatten() for part in parts])
    positive = whole[whole > 0].sort().values
    expected = [positive[0], positive[(len(positive) - 1) // 2], positive[-1]]
    assert torch.equal(update_range(lambda: parts), torch.stack(expected))


def test_channel_importance() -> None:
    updates = random(64, 32).abs()
    updates[random(64, 32, seed=1) > 1] = 0
    found = channel_importance(updates, update_range(lambda: [updates]))
    scaled = channel_importance(updates * 8, update_range(lambda: [updates * 8]))
    assert torch.allclose(found, scaled, rtol=1e-4)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(channel_importance(updates[:, order], update_range(lambda: [updates])), found[order])
    assert torch.allclose(channel_importance(updates.flip(0), update_range(lambda: [updates])), found)
    nothing = torch.zeros(64, 32)
    assert torch.equal(channel_importance(nothing, update_range(lambda: [nothing])), torch.full((32,), 65.0))


def test_no_change_is_round_to_nearest() -> None:
    weight, inputs = random(64, 128), random(512, 128, seed=4)
    importance = channel_importance(torch.zeros(64, 128), update_range(lambda: [torch.zeros(64, 128)]))
    loss = layer_loss({"w": weight}, gathered(inputs)["gram"])
    best = search({"w": weight}, {"w": UniformGrid(bits=3, scale_dtype="float32")}, importance, loss, 20, False)
    assert best.loss == pytest.approx(best.start, rel=1e-3)
    assert torch.allclose(
        scaled_weight(weight, torch.full((128,), 4.0), THREE_BITS), scaled_weight(weight, torch.ones(128), THREE_BITS)
    )


def test_quantlrm_on_a_block(tmp_path: Path) -> None:
    session = block(tmp_path)
    grid = UniformGrid(bits=3, group_size=32)
    statistics = session.statistics()
    transform = QuantLrm(clip=False, extremes="block")
    with pytest.raises(RecipeError, match="base"):
        transform.transform_block(
            session, session.names, dict.fromkeys(session.names, grid), statistics, SolveOptions()
        )
    for i, name in enumerate(session.names):
        noise = 1e-3 * torch.exp(random(session.layers[name].shape[1], seed=i)) * random(*session.layers[name].shape)
        statistics[name] = statistics[name] | {"base": session.weight(name) + noise}
    told: list[dict[str, Any]] = []
    grids = dict.fromkeys(session.names, grid)
    transform.transform_block(session, session.names, grids, statistics, SolveOptions(), told.append)
    assert [fact["loss"] <= fact["rtn"] for fact in told if "loss" in fact] == [True, True, True]
    with torch.no_grad():
        assert torch.allclose(session.run(session.inputs[0], 0), session.targets[0], rtol=1e-3, atol=1e-4)


def test_quantlrm_takes_the_range_of_the_whole_model(tmp_path: Path) -> None:
    session = block(tmp_path)
    name = session.names[0]
    base = {"base": session.weight(name) + 1e-3 * random(*session.layers[name].shape)}
    unit = Unit((name,), None, None)
    with pytest.raises(RecipeError, match="extremes"):
        QuantLrm().importance(session, unit, {name: base})
    assert "update_range" in QuantLrm().needs
    assert "update_range" not in QuantLrm(extremes="block").needs
    wide = torch.tensor([1e-9, 1e-3, 1.0])  # elsewhere in the model there were smaller and larger changes
    found = QuantLrm().importance(session, unit, {name: base | {"update_range": wide}})
    expected = channel_importance((session.weight(name) - base["base"]).abs(), wide)
    assert found is not None
    assert torch.equal(found, expected)
    alone = QuantLrm(extremes="block").importance(session, unit, {name: base})
    assert alone is not None
    assert not torch.allclose(found, alone, rtol=0.1)
