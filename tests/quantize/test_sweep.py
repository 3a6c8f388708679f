"""The Hessian sweep as a program: vectors of columns, hostile moments and shapes, its native form, presets."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_problems import (
    EXACT,
    NATIVE,
    ORDERS,
    SETTINGS,
    Problem,
    Steps,
    damp,
    grid,
    missed,
    needs_native,
    problem,
    run,
    same,
)
from torch import Tensor

from featherweight.methods.quantize.base import Grid, HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.sweep import Sweeper, SweepSettings, sweep
from featherweight.methods.quantize.sweep_factor import invert_lower
from featherweight.methods.recipe import load_recipe, presets
from featherweight.native.sweep import Columns, FeedbackRule, sweep_columns
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.permuted import Permuted


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- vectors ----


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("columns", [64, 66, 3])
def test_vectors_of_columns(order: str, columns: int) -> None:
    given = problem(n=columns)
    result = run(given, Steps(), order=order, block_size=10)
    assert result.loss == pytest.approx(missed(given.weight, result.code, given.damped()), rel=1e-10)
    assert isinstance(result.code, Permuted) == (order != "none")
    if columns > 3:
        plain = Steps().quantize(given.weight.float())
        assert missed(given.weight, result.code, given.damped()) < 0.8 * missed(given.weight, plain, given.damped())
    other = run(given, Steps(), order=order, block_size=64)
    assert same(result, other)


@pytest.mark.parametrize("how", [h for h in SETTINGS if "order" not in h], ids=str)
def test_vectors_are_invariant_to_blocks_under_all_settings(how: dict[str, Any]) -> None:
    given = problem(rows=6, n=50)
    assert same(run(given, Steps(), block_size=8, **how), run(given, Steps(), block_size=64, **how))


# ---- hostile moments and shapes ----


def hostile(name: str, n: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, n, generator=g)
    gram = x @ x.T / n
    if name == "nan":
        gram[3, 4] = torch.nan
    elif name == "infinite":
        gram[7, 7] = torch.inf
    elif name == "indefinite":
        gram -= 0.3 * torch.eye(n)
    elif name == "negative":
        gram = -gram
    elif name == "rank one":
        gram = torch.outer(x[0], x[0])
    elif name == "zero":
        gram = torch.zeros(n, n)
    elif name == "tiny":
        gram = gram * 1e-30
    elif name == "huge":
        gram = gram * 1e30
    elif name == "outlier":
        gram[0] *= 1e4
        gram[:, 0] *= 1e4
    elif name == "not symmetric":
        gram = gram + torch.randn(n, n, generator=g)
    return gram


HOSTILE = (
    "nan", "infinite", "indefinite", "negative", "rank one", "zero", "tiny", "huge", "outlier", "not symmetric"
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_no_moment_is_too_bad_for_a_finite_code(name: str, damping: float) -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    gram = hostile(name)
    before = gram.clone()
    on = UniformGrid(bits=3, group_size=16)
    with torch.no_grad():
        result = sweep(weight, {"gram": gram, "cross": gram}, on, SweepSettings(alpha=0.25, damping=damping))
    assert torch.equal(gram.nan_to_num(), before.nan_to_num())
    assert result.code.decode().isfinite().all()
    assert result.code.spec == on.spec((12, 40))
    if name in ("nan", "infinite", "zero", "negative"):
        assert result.data_free
        assert "rounded without data" in result.note
        assert torch.equal(result.code.decode(), on.quantize(weight).decode())
        assert result.report()["fallback"] == "data-free"
    elif name != "not symmetric":
        assert not result.data_free
        assert result.attempts[-1].succeeded
        assert result.damping == result.attempts[-1].damping
    if name == "indefinite":
        assert len(result.attempts) > 1
        assert "needed damping" in result.note
    if name in ("tiny", "huge") and damping:
        usual = sweep(weight, {"gram": hostile("")}, on)
        assert torch.equal(sweep(weight, {"gram": gram}, on).code.decode(), usual.code.decode())


def test_the_damping_that_was_used_is_stated() -> None:
    gram = torch.eye(8) - 0.3 * torch.ones(8, 8)  # smallest eigenvalue -1.4, mean diagonal 0.7
    result = sweep(torch.randn(4, 8), {"gram": gram}, grid(group_size=8), SweepSettings(damping_limit=4.0))
    assert [a.damping for a in result.attempts] == pytest.approx([0.01 * 2**k for k in range(9)])
    assert [a.succeeded for a in result.attempts] == [False] * 8 + [True]
    assert "2.56 after 8 failed tries" in result.note


def test_a_grid_without_levels_keeps_its_own_rounding() -> None:
    weight = torch.randn(4, 8)
    result = sweep(weight, {"gram": torch.eye(8)}, DenseGrid(dtype="float32"))
    assert torch.equal(result.code.decode(), weight)
    assert "no list of levels" in result.note


def test_missing_statistics_are_said() -> None:
    weight = torch.randn(4, 8)
    assert "gram" in sweep(weight, {}, grid()).note
    assert "cross" in sweep(weight, {"gram": torch.eye(8)}, grid(), SweepSettings(alpha=0.25)).note
    with pytest.raises(ValueError, match="second moment has 9 inputs, the weight 8"):
        sweep(weight, {"gram": torch.eye(9)}, grid())


def test_dead_inputs_get_zero_weights_and_disturb_nobody() -> None:
    given = problem(rows=10)
    dead = [0, 17, 63]
    inputs, original = given.inputs.clone(), given.original_inputs.clone()
    inputs[dead] = 0
    alive = [j for j in range(64) if j not in dead]
    whole = Problem(given.weight, inputs, original)
    cross = whole.statistics["cross"]
    few = Problem(given.weight[:, alive], inputs[alive], original[alive])
    for how in ({}, {"alpha": 0.25, "residual_compensation": 0.25}, {"alpha": 1.0, "target": "shift"}, {"shrink": 0.2}):
        on = grid(8)  # no groups whose range the dead columns could change: all rows reach both ends elsewhere
        found = sweep(whole.weight, {"gram": whole.statistics["gram"], "cross": cross}, on, SweepSettings(**how), EXACT)
        lone = sweep(few.weight, few.statistics, on, SweepSettings(**how), EXACT)
        decoded = found.code.decode()
        assert torch.equal(decoded[:, dead], torch.zeros(10, 3))
        if how.get("target") != "shift":
            assert torch.equal(decoded[:, alive], lone.code.decode())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (3, 5), (65, 130), (7, 127), (2, 129)])
@pytest.mark.parametrize("group_size", [1, 32, 100, 128, 1000])
def test_odd_shapes(rows: int, columns: int, group_size: int) -> None:
    g = torch.Generator().manual_seed(columns)
    weight, x = torch.randn(rows, columns, generator=g), torch.randn(columns, 2 * columns, generator=g)
    gram = x @ x.T / (2 * columns)
    on = UniformGrid(bits=4, group_size=group_size)
    for how in ORDERS:
        result = sweep(weight, {"gram": gram}, on, SweepSettings(**how))
        spec = result.code.spec.get("inner", result.code.spec)
        assert {**spec, "shape": [rows, columns]} == on.spec((rows, columns))
        assert result.loss == pytest.approx(missed(weight, result.code, damp(gram.double())), rel=1e-3, abs=1e-9)


def test_scales_have_one_type_even_where_a_group_alone_would_ask_for_another() -> None:
    weight = torch.randn(4, 64)
    weight[:, 16:32] *= 1e-5
    result = sweep(weight, {"gram": torch.eye(64)}, UniformGrid(group_size=16))
    assert result.code.spec == UniformGrid(group_size=16).spec((4, 64))


def test_a_wide_second_moment_is_cut_and_that_is_said() -> None:
    given = problem(n=300, samples=1500)
    result = run(given, grid(group_size=100), factor_columns=128)
    assert "3 diagonal blocks of 128 columns" in result.note
    blocks = torch.block_diag(*[torch.ones(w, w) for w in (128, 128, 44)])
    gram = given.statistics["gram"]
    cut = sum(
        missed(given.weight[:, a:b], Dense(result.code.decode()[:, a:b].contiguous()), damp(gram[a:b, a:b]))
        for a, b in ((0, 128), (128, 256), (256, 300))
    )
    assert blocks.sum() > 0
    assert result.loss == pytest.approx(cut, rel=1e-9)
    plain = grid(group_size=100).quantize(given.weight.float())
    assert missed(given.weight, result.code, gram) < missed(given.weight, plain, gram)
    with pytest.raises(ValueError, match="whole vectors"):
        run(given, type("Three", (Steps,), {"columns_jointly": property(lambda _: 3)})(), factor_columns=128)


def test_the_triangular_inverse() -> None:
    for n in (1, 2, 63, 513, 1100):
        lower = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tril() / n
        lower += torch.eye(n, dtype=torch.float64)
        inverse = invert_lower(lower)
        assert torch.equal(inverse, inverse.tril())
        assert torch.allclose(inverse @ lower, torch.eye(n, dtype=torch.float64), atol=1e-9)


# ---- native ----


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_native_columns_are_the_reference_bit_for_bit(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 40))
    groups, count = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 3, 9, 16, 256]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    weight, original = torch.randn(2, rows, columns + 3, generator=g)
    upper = (torch.randn(columns, columns, generator=g) * 0.3).triu(1) + torch.diag(
        torch.rand(columns, generator=g) + 0.5
    )
    feedback = torch.randn(columns, columns, generator=g) * 0.1 if data.draw(st.booleans()) else None
    levels = torch.randn(rows, groups, count, generator=g).sort(-1).values
    if data.draw(st.booleans()):
        levels = (levels * 2).round() / 2  # equal levels and ties
        weight = (weight * 4).round() / 4
    group_of = torch.randint(0, groups, (columns,), generator=g, dtype=torch.int32)
    amount = st.sampled_from([0.0, 0.25, 1.0])
    rule = FeedbackRule(
        data.draw(amount), data.draw(amount), data.draw(amount), data.draw(st.sampled_from(["none", "next-column"])),
        data.draw(st.sampled_from(["pre", "rounded", "clamped"])),
    )  # fmt: skip
    outcomes = []
    for backend, threads in (("reference", 1), ("native", 1), ("native", 3)):
        copy = weight.clone()
        columns = Columns(copy[:, 2:-1], original[:, 2:-1], upper, feedback, levels, group_of, rule)
        swept = sweep_columns(columns, threads, backend)
        outcomes.append((copy, swept))
    (w, expected), *others = outcomes
    for copy, found in others:
        assert torch.equal(copy, w)
        assert torch.equal(found.indices, expected.indices)
        for name in ("errors", "residuals", "tail_errors", "tail_residuals"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert (found.clipped, found.drift) == (expected.clipped, expected.drift)
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    "on", [UniformGrid(bits=3, group_size=32), TritPlaneGrid(group_size=64)], ids=["uniform", "trits"]
)
def test_native_sweeps_are_the_reference_on_every_instruction_set(isa: str, on: Grid) -> None:
    assert NATIVE is not None
    try:
        NATIVE.select_isa(isa)
    except ValueError:
        pytest.skip(f"no {isa} here")
    try:
        given = problem(rows=70, n=150)
        moments = {name: value.float() for name, value in given.statistics.items()}
        for how in (*ORDERS, *SETTINGS, {"alpha": 0.25, "residual_compensation": 0.25, "tail": "clamped"}):
            ways = [
                sweep(given.weight.float(), moments, on, SweepSettings(block_size=48, **how), options)
                for options in (EXACT, SolveOptions(threads=1), SolveOptions(threads=3))
            ]
            assert same(ways[0], ways[1])
            assert same(ways[0], ways[2])
            assert ways[1].loss == ways[2].loss
            assert ways[1].loss == pytest.approx(ways[0].loss, rel=1e-9)
    finally:
        NATIVE.select_isa("auto")


def test_the_same_again() -> None:
    given = problem(rows=70, n=200)
    moments = {name: value.float() for name, value in given.statistics.items()}
    first, second = (sweep(given.weight.float(), moments, grid(), SweepSettings(alpha=0.25)) for _ in range(2))
    assert same(first, second)
    assert first.loss == second.loss


def test_float32_is_close_to_float64() -> None:
    given = problem(rows=32, n=256)
    moments = {name: value.float() for name, value in given.statistics.items()}
    exact = run(given, UniformGrid(bits=3))
    single = sweep(given.weight.float(), moments, UniformGrid(bits=3))
    assert float((exact.code.decode() != single.code.decode()).float().mean()) < 0.01
    assert single.loss == pytest.approx(exact.loss, rel=1e-2)


# ---- the rounding and its presets ----


def test_layers_that_share_an_input_share_the_factor() -> None:
    given = problem(rows=8)
    moments = {name: value.float() for name, value in given.statistics.items()}
    rounding = Hessian()
    sweeper = rounding.sweeper(moments)
    assert sweeper.factor(64) is sweeper.factor(32)
    assert Sweeper(moments, SweepSettings(order="group-aware")).factor(64) is not sweeper.factor(64)
    weight, on = given.weight.float(), UniformGrid(bits=3, group_size=16)
    before = moments["gram"].clone()
    codes = [rounding.quantize_source(HeldWeight(weight), on, moments, SolveOptions()) for _ in range(3)]
    assert torch.equal(moments["gram"], before)
    assert all(torch.equal(code.decode(), codes[0].decode()) for code in codes)
    assert torch.equal(codes[0].decode(), sweeper.run(weight, on).code.decode())
    code, report = rounding.quantize_reported(HeldWeight(weight), on, moments, SolveOptions())
    assert torch.equal(code.decode(), codes[0].decode())
    assert report["damping"] == 0.01
    assert 0 <= report["clipped"] < 0.1


def test_a_new_second_moment_is_a_new_factor() -> None:
    rounding, on = Hessian(), UniformGrid(bits=3, group_size=16)
    for seed in range(4):  # freed tensors may come back at the same address
        given = problem(seed, rows=8)
        moments = {"gram": given.statistics["gram"].float()}
        code = rounding.quantize_source(HeldWeight(given.weight.float()), on, moments, SolveOptions())
        assert torch.equal(code.decode(), sweep(given.weight.float(), moments, on).code.decode())
        del moments
        gc.collect()


def test_a_changed_second_moment_is_noticed_and_none_is_kept_alive() -> None:
    rounding, on = Hessian(), UniformGrid(bits=3, group_size=16)
    given = problem(rows=8)
    weight, moments = given.weight.float(), {"gram": given.statistics["gram"].float()}
    rounding.quantize_source(HeldWeight(weight), on, moments, SolveOptions())
    moments["gram"] += torch.eye(64)
    code = rounding.quantize_source(HeldWeight(weight), on, moments, SolveOptions())
    assert torch.equal(code.decode(), sweep(weight, moments, on).code.decode())
    alive = weakref.ref(moments["gram"])
    del moments
    gc.collect()
    assert alive() is None


def test_what_is_needed_is_declared() -> None:
    assert Hessian().needs == ("gram",)
    assert Hessian(residual_compensation=0.25, shrink=0.1).needs == ("gram",)
    assert Hessian(alpha=0.25).needs == ("gram", "cross")
    assert Hessian(alpha=0.25, target="shift").needs == ("gram", "cross")


FAMILIES = ("gptq", "gptaq", "rescomp", "foem")


@pytest.mark.parametrize("name", [n for n in presets() if n.split("-")[0] in FAMILIES and "-" not in n])
def test_presets_beat_rounding_on_their_layer(name: str) -> None:
    recipe = load_recipe(name)
    given = problem(rows=16, n=256)
    moments = {k: v.float() for k, v in given.statistics.items()}
    code = recipe.rounding.quantize_source(HeldWeight(given.weight.float()), recipe.grid, moments, SolveOptions())
    plain = recipe.grid.quantize(given.weight.float())
    assert missed(given.weight, code, moments["gram"]) < missed(given.weight, plain, moments["gram"])


def test_every_family_has_a_preset() -> None:
    assert set(FAMILIES) <= set(presets())
