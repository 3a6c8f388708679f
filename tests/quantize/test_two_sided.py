"""Two-sided rounding: its formula by brute force, the one-sided sweep as a special case, its gain, its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep_problems import EXACT, damp, grid, needs_native, problem
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import carried, restricted
from featherweight.methods.quantize.base import Grid, HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.binary_planes import BinaryPlaneGrid
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.grids.dual_scale import DualScaleGrid
from featherweight.methods.quantize.grids.pyramid import PyramidGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.rounding.two_sided import TwoSided
from featherweight.methods.quantize.sweep import Sweeper, SweepSettings
from featherweight.methods.quantize.sweep_factor import FactorSettings
from featherweight.methods.quantize.sweep_rows import RowFeedback
from featherweight.methods.recipe import load_recipe
from featherweight.native.sweep import Columns, FeedbackRule
from featherweight.native.sweep_rows import sweep_rows
from featherweight.storage.codes import Code
from featherweight.tasks.compress.refusals import check_recipe


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spd(n: int, kind: str, seed: int = 0) -> Tensor:
    """A positive definite matrix with strong off-diagonals, or none; float64 [n, n]."""
    if kind == "neighbours":
        place = torch.arange(n, dtype=torch.float64)
        return 0.9 ** (place[:, None] - place).abs()
    a = torch.randn(n, max(2, n // 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h = a @ a.T / a.shape[1] + 0.1 * torch.eye(n, dtype=torch.float64)
    return torch.diag(h.diagonal()) if kind == "diagonal" else torch.eye(n).double() if kind == "identity" else h


def case(rows: int, columns: int, kind: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight float32 and its statistics."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 7))
    return weight, {
        "gram": spd(columns, "few", seed + 1).float(),
        "output_gram": spd(rows, kind, seed + 2).float(),
    }


ONE = SolveOptions(threads=1)


def solved(
    weight: Tensor, statistics: dict[str, Tensor], on: Grid | None = None, options: SolveOptions = ONE, **how: Any
) -> Code:
    code, _ = TwoSided(**how).quantize_reported(HeldWeight(weight), on or grid(), statistics, options)
    return code


def same_codes(a: Code, b: Code) -> bool:
    theirs = b.tensors()
    return a.spec == b.spec and all(torch.equal(tensor, theirs[name]) for name, tensor in a.tensors().items())


def loss(weight: Tensor, code: Code, statistics: dict[str, Tensor]) -> float:
    """tr(E' H_O E H_I), E = W - Q."""
    error = weight.double() - code.decode().double()
    return float(((statistics["output_gram"].double() @ error @ statistics["gram"].double()) * error).sum())


# ---- the formula ----


def lower_strict(moment: Tensor) -> Tensor:
    """L of moment = (I + L) D (I + L)', unit lower triangular, without its diagonal; by elimination."""
    rest, found = moment.clone(), torch.zeros_like(moment)
    for j in range(len(moment)):
        found[j:, j] = rest[j:, j] / rest[j, j]
        rest = rest - rest[j, j] * torch.outer(found[:, j], found[:, j])
    return found - torch.eye(len(moment), dtype=moment.dtype)


def from_the_bottom_right(weight: Tensor, h_in: Tensor, h_out: Tensor, levels: Tensor) -> Tensor:
    """The published form, one weight after another along anti-diagonals: values [out, in], float64."""
    l_in, l_out = lower_strict(h_in), lower_strict(h_out)
    rows, columns = weight.shape
    rounded, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for diagonal in reversed(range(rows + columns - 1)):
        for i in range(max(0, diagonal - columns + 1), min(rows, diagonal + 1)):
            j = diagonal - i
            target = weight + l_out.T @ error @ l_in + l_out.T @ error + error @ l_in
            rounded[i, j] = levels[i, (target[i, j] - levels[i]).abs().argmin()]
            error[i, j] = weight[i, j] - rounded[i, j]
    return rounded


@pytest.mark.parametrize("kind", ["neighbours", "few"])
@pytest.mark.parametrize("options", [EXACT, SolveOptions()], ids=["reference", "as it is"])
def test_it_is_its_formula(kind: str, options: SolveOptions) -> None:
    """8 x 8, levels fixed beforehand: the published order on the matrix turned by half a turn."""
    for seed in range(6):
        weight, statistics = case(8, 8, kind, seed)
        on = grid(bits=2, group_size=8)
        code = solved(weight, statistics, on, options, groups="static")
        levels = on.levels(on.fit(weight))[:, 0].double()
        damped = [damp(statistics[name].double()).flip(0, 1) for name in ("gram", "output_gram")]
        expected = from_the_bottom_right(weight.double().flip(0, 1), *damped, levels.flip(0)).flip(0, 1)
        assert torch.allclose(code.decode().double(), expected, atol=1e-6), seed


@pytest.mark.parametrize("how", [{}, {"output_order": "activation"}, {"tile": 3}, {"order": "group-aware"}], ids=str)
def test_the_loss_it_reports_is_the_trace(how: dict[str, Any]) -> None:
    weight, statistics = case(21, 40, "few")
    statistics = {name: value.double() for name, value in statistics.items()}
    statistics["output_gram"] = statistics["output_gram"] * 3
    rows = TwoSided(**how)._rows(statistics, 21)
    settings = SweepSettings(order=how.get("order", "none"))
    result = Sweeper(statistics, settings).run(weight.double(), grid(group_size=16), EXACT, rows=rows)
    damped = {name: damp(value) for name, value in statistics.items()}
    assert result.loss == pytest.approx(loss(weight, result.code, damped), rel=1e-6)


def test_rows_between_which_nothing_is_handed_on_are_those_of_a_tile() -> None:
    """Block factors: with a block-diagonal H_O, tiles of its blocks are rounded as if alone."""
    weight, statistics = case(12, 24, "few")
    blocks = torch.block_diag(*[spd(4, "few", seed=seed).float() for seed in range(3)])
    tiled = solved(weight, statistics | {"output_gram": blocks}, tile=4)
    assert same_codes(tiled, Hessian().quantize_source(HeldWeight(weight), grid(), statistics, ONE))
    exact = solved(weight, statistics | {"output_gram": blocks})
    assert not same_codes(exact, tiled)


# ---- the one-sided sweep as a special case ----

GRIDS: dict[str, Grid] = {
    "uniform": grid(group_size=16),
    "uniform-mse": UniformGrid(bits=2, group_size=16, clip="mse"),
    "per-column": UniformGrid(bits=3, axis="output", group_size=1, output_group_size=5),
    "trit-planes": TritPlaneGrid(group_size=16),
    "dual-scale": DualScaleGrid(group_size=16, iterations=3),
    "strips": BinaryPlaneGrid(bits=2, terms=3, group_size=8, strips=8, rounds=3),
}


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("kind", ["identity", "diagonal"])
@pytest.mark.parametrize("tile", [1, 7])
def test_a_diagonal_output_moment_gives_the_codes_of_the_one_sided_sweep(name: str, kind: str, tile: int) -> None:
    weight, statistics = case(24, 50, kind)
    one = Hessian().quantize_source(HeldWeight(weight), GRIDS[name], statistics, ONE)
    assert same_codes(solved(weight, statistics, GRIDS[name], tile=tile), one)


@pytest.mark.parametrize(
    "how",
    [
        {"order": "activation", "groups": "static"},
        {"order": "activation"},
        {"order": "group-aware"},
        {"order": "similarity"},
        {"block_size": 10, "factor_columns": 128},
    ],
    ids=str,
)
def test_orders_of_columns_are_those_of_the_one_sided_sweep(how: dict[str, Any]) -> None:
    weight, statistics = case(20, 160, "diagonal")
    on = grid(group_size=16)
    one = Hessian(**how).quantize_source(HeldWeight(weight), on, statistics, ONE)
    assert same_codes(solved(weight, statistics, on, output_order="activation", **how), one)
    assert TwoSided(**how).extra_bytes((20, 160)) == Hessian(**how).extra_bytes((20, 160))


# ---- what it gains ----


@pytest.mark.parametrize("kind", ["few", "neighbours"])
@pytest.mark.parametrize("name", ["uniform", "uniform-mse", "trit-planes"])
def test_the_loss_of_a_planted_kronecker_product_falls(kind: str, name: str) -> None:
    weight, statistics = case(96, 64, kind)
    one = Hessian().quantize_source(HeldWeight(weight), GRIDS[name], statistics, ONE)
    before = loss(weight, one, statistics)
    assert loss(weight, solved(weight, statistics, GRIDS[name]), statistics) < 0.5 * before


def test_tiles_lose_what_neighbours_know_of_each_other() -> None:
    weight, statistics = case(96, 64, "neighbours")
    losses = [
        loss(weight, solved(weight, statistics, grid(group_size=16), tile=tile), statistics) for tile in (1, 4, 32)
    ]
    assert losses[0] < 0.7 * losses[1]
    assert losses[1] < 0.8 * losses[2]


def test_rows_by_importance_need_no_stored_order() -> None:
    weight, statistics = case(96, 64, "few")
    sizes = torch.logspace(-1, 1, 96)
    statistics["output_gram"] = sizes[:, None] * statistics["output_gram"] * sizes
    plain, ordered = (solved(weight, statistics, output_order=order) for order in ("none", "activation"))
    assert ordered.spec == plain.spec
    assert loss(weight, ordered, statistics) < 0.8 * loss(weight, plain, statistics)


# ---- the native form ----


@needs_native
@pytest.mark.parametrize("levels", [1, 2, 16, 256])
def test_the_native_form_has_the_bits_of_the_definition(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    rows, columns = 37, 50
    weight, target = torch.randn(rows, columns + 3, generator=g)[:, :columns], torch.randn(rows, columns, generator=g)
    upper, between = (torch.randn(n, n, generator=g).triu() / n + torch.eye(n) for n in (columns, rows))
    chosen = torch.randn(rows, 4, levels, generator=g).sort(dim=-1).values
    group_of = (torch.arange(columns) // 13).to(torch.int32)
    found = []
    for backend in ("native", "reference"):
        mine = Columns(weight.clone(), target.clone(), upper, None, chosen, group_of, FeedbackRule())
        swept, passed = sweep_rows(mine, between, 1, backend)  # type: ignore[arg-type]
        found.append((mine.weight, mine.original, swept.indices, swept.errors, passed, swept.totals[1:]))
        found[-1] += (swept.totals[0],)
    for one, other in zip(found[0][:-1], found[1][:-1], strict=True):
        assert torch.equal(one, other)
    assert float(found[0][-1]) == pytest.approx(float(found[1][-1]), rel=1e-12)


def test_a_rule_and_a_cross_moment_are_refused() -> None:
    part = torch.zeros(2, 2)
    columns = Columns(
        part, part.clone(), torch.eye(2), None, torch.zeros(2, 1, 2), torch.zeros(2).int(), FeedbackRule(0.5)
    )
    with pytest.raises(ValueError, match="no rule of its own and no cross moment"):
        sweep_rows(columns, torch.eye(2))


# ---- what it refuses ----


@pytest.mark.parametrize("on", [DenseGrid(), PyramidGrid()], ids=lambda g: g.kind)
def test_grids_without_levels_are_refused(on: Grid) -> None:
    weight, statistics = case(8, 16, "few")
    assert "list of" in str(TwoSided().refusal(on))
    with pytest.raises(RecipeError, match=f"needs a grid that has a list of them, not '{on.kind}'"):
        solved(weight, statistics, on)


def test_bad_output_moments_are_refused() -> None:
    weight, statistics = case(8, 16, "few")
    moment = statistics.pop("output_gram")
    with pytest.raises(RecipeError, match="needs the statistic output_gram, which was not gathered"):
        solved(weight, statistics)
    with pytest.raises(RecipeError, match=r"output_gram is \[7, 7\], but the weight has 8 rows"):
        solved(weight, statistics | {"output_gram": moment[:7, :7]})
    spoilt = moment.clone()
    spoilt[2, 5] = torch.nan
    with pytest.raises(RecipeError, match="output_gram is not finite"):
        solved(weight, statistics | {"output_gram": spoilt})
    with pytest.raises(RecipeError, match="output_gram is no second moment"):
        solved(weight, statistics | {"output_gram": -moment})
    with pytest.raises(ValueError, match="the second moment has 15 inputs, the weight 16"):
        solved(weight, {"gram": statistics["gram"][:15, :15], "output_gram": moment})


def test_where_nothing_is_known_it_does_what_the_one_sided_sweep_does() -> None:
    weight, statistics = case(8, 16, "few")
    one = Hessian().quantize_source(HeldWeight(weight), grid(), statistics, EXACT)
    zero = statistics | {"output_gram": torch.zeros(8, 8)}
    code, report = TwoSided().quantize_reported(HeldWeight(weight), grid(), zero, EXACT)
    assert same_codes(code, one)
    assert report["output_gram"] == "zero: rounded one-sidedly"
    plain = grid().quantize(weight)
    assert same_codes(solved(weight, {}), plain)
    spoilt = statistics | {"gram": statistics["gram"] * torch.nan}
    code, report = TwoSided().quantize_reported(HeldWeight(weight), grid(), spoilt, EXACT)
    assert same_codes(code, plain)
    assert "not finite" in report["reason"]


def test_rows_that_no_gradient_reached_stand_alone() -> None:
    weight, statistics = case(8, 16, "few")
    statistics["output_gram"][3] = statistics["output_gram"][:, 3] = 0
    one = Hessian().quantize_source(HeldWeight(weight), grid(), statistics, ONE)
    assert torch.equal(solved(weight, statistics).decode()[3], one.decode()[3])


def test_damping_that_was_needed_is_said() -> None:
    weight, statistics = case(8, 16, "few")
    indefinite = statistics["output_gram"] - 0.15 * torch.eye(8)
    assert float(torch.linalg.eigvalsh(indefinite)[0]) < 0
    given = statistics | {"output_gram": indefinite}
    _, report = TwoSided().quantize_reported(HeldWeight(weight), grid(), given, EXACT)
    assert report["output_damping"] > 0.01
    assert "needed damping" in report["output_note"]
    assert indefinite is given["output_gram"]
    feedback = RowFeedback.of(statistics["output_gram"], FactorSettings(damping=0.2), "none", 1)
    product = feedback.upper.double().T @ feedback.upper.double() @ damp(statistics["output_gram"].double(), 0.2)
    assert torch.allclose(product, torch.eye(8).double(), atol=1e-4)


# ---- the statistic, and recipes ----


def test_the_output_moment_knows_no_basis_of_the_input() -> None:
    _, statistics = case(8, 16, "few")
    turned = carried(statistics, lambda x: x.flip(-1), lambda w: w.flip(-1))
    assert turned["output_gram"] is statistics["output_gram"]
    assert restricted(statistics, 4, 9)["output_gram"].shape == (8, 8)
    assert restricted(statistics, 4, 9)["gram"].shape == (5, 5)


def test_a_recipe_may_ask_for_it() -> None:
    recipe = load_recipe(
        {"name": "both", "title": "t", "paper": "p", "grid": {"kind": "uniform", "bits": 2},
         "rounding": {"kind": "two-sided", "output_order": "activation"}}
    )  # fmt: skip
    check_recipe(recipe)
    assert recipe.needs == ("gram", "output_gram")
    with pytest.raises(RecipeError, match="set groups to dynamic"):
        load_recipe({"name": "x", "grid": {"kind": "uniform"}, "rounding": {"kind": "two-sided", "order": "similarity",
                     "groups": "static"}})  # fmt: skip


def test_the_sweep_of_a_problem_in_double_precision() -> None:
    """tr(E' H_O E H_I) of a float64 weight, through the public sweep with the settings of the one-sided one."""
    given = problem(rows=16, n=24)
    feedback = RowFeedback.of(spd(16, "few"), FactorSettings(), "none", 1)
    both = Sweeper(given.statistics, SweepSettings()).run(given.weight, grid(), EXACT, rows=feedback)
    one = Sweeper(given.statistics, SweepSettings()).run(given.weight, grid(), EXACT)
    known = {"gram": given.statistics["gram"], "output_gram": spd(16, "few")}
    assert loss(given.weight, both.code, known) < 0.7 * loss(given.weight, one.code, known)
