"""Trit-planes under a second moment: least squares, descent, the kernel, and the formats they made worthwhile."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.trit_descent import TritDescent, _damped, _Rows
from featherweight.native import library
from featherweight.native import trit_descent as kernel
from featherweight.native.ptqtp_settings import join_trits
from featherweight.native.trit_descent import descend
from featherweight.storage.codes import code_from
from featherweight.storage.codes.trit_planes import TritPlanes, log8_decode, log8_encode, log8_rounded

NATIVE = pytest.mark.skipif(library.get() is None, reason="no native library")
FREE = TritPlaneGrid(planes=2, group_size=16)
THREE_TWO = TritPlaneGrid(planes=2, tied=True, tied_ratio="3:2", group_size=8, scale_dtype="log8", fitting="weighted")
GRIDS = {
    "free": FREE,
    "free-weighted": TritPlaneGrid(planes=2, group_size=16, fitting="weighted"),
    "3:2": THREE_TWO,
    "one": TritPlaneGrid(planes=1, group_size=8, scale_dtype="log8", fitting="weighted"),
    "three-tied": TritPlaneGrid(planes=3, tied=True, group_size=16),
    "short-last-group": TritPlaneGrid(planes=2, group_size=20),
}


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a correlated second moment, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs @ (mixing + 0.7 * torch.eye(columns, dtype=torch.float64))
    weight = 0.02 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs / len(inputs)


def error(weight: Tensor, value: Tensor, gram: Tensor) -> Tensor:
    residual = weight - value.to(weight.dtype)
    return ((residual @ gram) * residual).sum(1)


def rounded(rounding: TritDescent, weight: Tensor, grid: TritPlaneGrid, gram: Tensor) -> TritPlanes:
    code = rounding.quantize_source(HeldWeight(weight.float()), grid, {"gram": gram.float()}, SolveOptions(threads=1))
    assert isinstance(code, TritPlanes)
    return code


def rows_of(grid: TritPlaneGrid, weight: Tensor, gram: Tensor) -> _Rows:
    """The state of a descent, begun at nearest rounding."""
    grid = grid.model_copy(update={"scale_dtype": "float16"}) if grid.scale_dtype == "auto" else grid
    code = grid.quantize(weight.float())
    assert isinstance(code, TritPlanes)
    scales = code.scales.unsqueeze(-1) if code.tied else code.scales
    return _Rows(weight, gram, grid, join_trits(code.unpack()), scales.float(), SolveOptions(threads=1))


# ---- the objective ----


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("columns", [64, 50])
def test_no_step_raises_the_error_of_any_row(name: str, columns: int) -> None:
    weight, gram = problem(9, columns)
    rows = rows_of(GRIDS[name], weight, gram)
    errors = [error(weight, rows.values(), gram)]
    for pairs in (False, True, True):
        rows.solve_scales()
        errors.append(error(weight, rows.values(), gram))
        rows.descend(32, pairs)
        errors.append(error(weight, rows.values(), gram))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(errors[-1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("name", GRIDS)
def test_the_code_has_the_error_that_is_reported_and_beats_the_sweep(name: str) -> None:
    weight, gram = problem(9, 64)
    options, source = SolveOptions(threads=1), HeldWeight(weight.float())
    code, report = TritDescent(descent_damping=0.01).quantize_reported(
        source, GRIDS[name], {"gram": gram.float()}, options
    )
    damped = _damped(gram.float().double(), 0.01)
    assert float(error(weight.float().double(), code.decode(), damped).sum()) == pytest.approx(
        report["descent_after"], rel=1e-4
    )
    assert report["descent_after"] < 0.95 * report["descent_before"]
    swept = TritDescent(rounds=0).quantize_source(source, GRIDS[name], {"gram": gram.float()}, options)
    assert float(error(weight, swept.decode(), damped).sum()) == pytest.approx(report["descent_before"], rel=1e-3)


def test_scales_of_a_row_are_the_least_squares_solution() -> None:
    weight, gram = problem(4, 48)
    rows = rows_of(FREE.model_copy(update={"scale_dtype": "float32"}), weight, gram)
    trits = [plane.double() for plane in rows.trits()]
    rows.solve_scales()
    root = np.linalg.cholesky(gram.numpy()).T
    for i in range(4):
        design = torch.zeros(48, 6, dtype=torch.float64)
        for group, plane in itertools.product(range(3), range(2)):
            part = slice(16 * group, 16 * group + 16)
            design[part, 2 * group + plane] = trits[plane][i, part]
        expected = np.linalg.lstsq(root @ design.numpy(), root @ weight[i].numpy(), rcond=None)[0]
        np.testing.assert_allclose(rows.scales[i].flatten().numpy(), expected, rtol=1e-5)


def test_stored_scales_make_up_for_each_others_rounding() -> None:
    """Rounding the solution scale by scale is worse than what is found."""
    weight, gram = problem(16, 64, seed=3)
    exact = rows_of(THREE_TWO.model_copy(update={"scale_dtype": "float32"}), weight, gram)
    exact.codes = rows_of(THREE_TWO, weight, gram).codes
    exact.solve_scales()
    stored = rows_of(THREE_TWO, weight, gram)
    stored.solve_scales()
    exact.scales = log8_rounded(exact.scales) * exact.scales.sign()
    assert stored.error() < exact.error()


@pytest.mark.parametrize("planes", [1, 2])
def test_descent_ends_where_no_single_change_helps(planes: int) -> None:
    weight, gram = problem(5, 24)
    rows = rows_of(TritPlaneGrid(planes=planes, group_size=8), weight, gram)
    while rows.descend(24, pairs=False):
        pass
    base = error(weight, rows.values(), gram)
    for j, code in itertools.product(range(24), range(3**planes)):
        kept = rows.codes.clone()
        rows.codes[:, j] = code
        assert bool((error(weight, rows.values(), gram) >= base * (1 - 1e-12)).all())
        rows.codes = kept


def test_pairs_often_reach_the_optimum_of_tiny_problems() -> None:
    """Brute force over 3^6 codes; never below it, and nearer to it than single moves."""
    weight, gram = problem(40, 6, seed=5)
    grid = TritPlaneGrid(planes=1, group_size=6)
    start = rows_of(grid, weight, gram)
    combos = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)), dtype=torch.float64)
    values = start.scales[:, :, 0].double().unsqueeze(-1) * combos  # [rows, 729, 6] by broadcasting
    residual = weight.unsqueeze(1) - values
    best = ((residual @ gram) * residual).sum(-1).amin(1)
    shares = []
    for pairs in (False, True):
        rows = rows_of(grid, weight, gram)
        while rows.descend(6, pairs):
            pass
        found = error(weight, rows.values(), gram)
        assert bool((found >= best * (1 - 1e-9)).all())
        shares.append(float((found <= best * (1 + 1e-9)).double().mean()))
    assert shares[1] > max(shares[0], 0.8)


# ---- the kernel ----


@NATIVE
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size", "levels"), [(33, 64, 16, 9), (20, 37, 8, 3), (9, 50, 16, 27)])
def test_native_and_reference_agree_to_the_bit(rows: int, columns: int, size: int, levels: int, pairs: bool) -> None:
    weight, gram = problem(rows, columns)
    generator = torch.Generator().manual_seed(1)
    groups = -(-columns // size)
    table = (0.02 * torch.randn(rows, groups, levels, generator=generator)).sort(-1).values
    group_of = torch.arange(columns, dtype=torch.int32) // size
    indices = torch.randint(0, levels, (rows, columns), dtype=torch.uint8, generator=generator)
    value = table[:, group_of.long()].gather(-1, indices.long().unsqueeze(-1)).squeeze(-1).double()
    gradient = ((weight - value) @ gram).contiguous()
    outcomes = []
    for threads, backend in ((1, "reference"), (1, "native"), (3, "native")):
        state = indices.clone(), gradient.clone()
        outcomes.append(
            [*state, *descend(gram, table, group_of, *state, 4, pairs=pairs, threads=threads, backend=backend)]  # type: ignore[arg-type]
        )
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    found = table[:, group_of.long()].gather(-1, outcomes[0][0].long().unsqueeze(-1)).squeeze(-1)
    fallen = error(weight, value, gram) - error(weight, found, gram)
    torch.testing.assert_close(fallen, outcomes[0][2], rtol=1e-10, atol=1e-14)
    assert int(outcomes[0][3].sum()) > 0


@NATIVE
def test_windows_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sees Ctrl-C between them."""
    calls = 0

    def run(together: int) -> list[Tensor]:
        nonlocal calls
        function = kernel._native()
        assert function is not None

        def counted(job: int, threads: int) -> int:
            nonlocal calls
            calls += 1
            return function(job, threads)

        monkeypatch.setattr(kernel, "TOGETHER", together)
        generator = torch.Generator().manual_seed(3)
        weight, gram = problem(50, 24)
        levels = torch.tensor([-1.0, 0.0, 1.0]).repeat(50, 3, 1)
        indices = torch.randint(0, 3, (50, 24), generator=generator).to(torch.uint8)
        gradient = (weight - (indices.double() - 1)) @ gram
        block = kernel._Block(gram, levels, torch.arange(24, dtype=torch.int32) // 8, indices, gradient)
        return [*kernel._descend_native(counted, block, 3, True, 1), indices, gradient]

    whole = run(1 << 40)
    assert calls == 1
    assert all(torch.equal(a, b) for a, b in zip(run(1), whole, strict=True))
    assert calls == 1 + 4  # sixteen rows at a time


def test_the_kernel_refuses_tensors_that_do_not_fit() -> None:
    gram, indices = torch.eye(4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.uint8)
    gradient = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not fit together"):
        descend(gram[:3, :3], torch.zeros(2, 1, 3), torch.zeros(4, dtype=torch.int32), indices, gradient, 1)


# ---- awkward moments ----


@pytest.mark.parametrize("kind", ["rank one", "zero", "dead columns", "tiny", "huge spread"])
def test_singular_and_ill_conditioned_moments(kind: str) -> None:
    weight, gram = problem(6, 40)
    if kind == "rank one":
        gram = torch.outer(gram[0], gram[0])
    elif kind == "zero":
        gram = torch.zeros_like(gram)
    elif kind == "dead columns":
        gram[::3] = gram[:, ::3] = 0
    elif kind == "tiny":
        gram = gram * 1e-20
    else:
        spread = torch.logspace(-5, 5, 40, dtype=torch.float64)
        gram = gram * spread * spread.unsqueeze(1)
    code = rounded(TritDescent(), weight, THREE_TWO, gram)
    assert bool(torch.isfinite(code.decode()).all())
    nearest = THREE_TWO.quantize(weight.float())
    assert float(error(weight, code.decode(), gram).sum()) <= float(error(weight, nearest.decode(), gram).sum()) + 1e-12


def test_a_moment_that_is_not_finite_falls_back_to_the_weights_alone() -> None:
    weight, gram = problem(6, 40)
    gram[3, 5] = float("nan")
    code, report = TritDescent().quantize_reported(
        HeldWeight(weight.float()), FREE, {"gram": gram.float()}, SolveOptions(threads=1)
    )
    assert report["fallback"] == "data-free"
    assert torch.equal(code.decode(), FREE.quantize(weight.float()).decode())


def test_the_same_every_time_and_row_by_row() -> None:
    weight, gram = problem(12, 40)
    whole = rounded(TritDescent(), weight, THREE_TWO, gram)
    assert torch.equal(whole.decode(), rounded(TritDescent(), weight, THREE_TWO, gram).decode())


def test_the_target_follows_the_full_precision_stream() -> None:
    """With a cross moment D, W (X + dX) is met better by the shifted target."""
    weight, gram = problem(24, 40)
    generator = torch.Generator().manual_seed(2)
    cross = 0.3 * torch.randn(40, 40, generator=generator, dtype=torch.float64) @ gram / 40**0.5
    statistics = {"gram": gram.float(), "cross": cross.float()}
    residuals = []
    for alpha in (0.0, 1.0):
        code = TritDescent(alpha=alpha).quantize_source(
            HeldWeight(weight.float()), THREE_TWO, statistics, SolveOptions(threads=1)
        )
        target = weight + torch.linalg.solve(gram, (weight @ cross).T).T
        residuals.append(float(error(target, code.decode(), gram).sum()))
    assert residuals[1] < 0.5 * residuals[0]


def test_what_it_cannot_do_is_refused() -> None:
    weight, gram = problem(4, 16)
    with pytest.raises(RecipeError, match="trit-planes"):
        TritDescent().quantize_source(HeldWeight(weight.float()), UniformGrid(), {"gram": gram}, SolveOptions())
    with pytest.raises(ValueError, match="order"):
        TritDescent(order="activation")
    with pytest.raises(ValueError, match="whole groups"):
        TritDescent(order="similarity")
    with pytest.raises(ValueError, match="tied"):
        TritPlaneGrid(tied_ratio="3:2", fitting="weighted")
    with pytest.raises(ValueError, match="fitting"):
        TritPlaneGrid(tied=True, tied_ratio="3:2")


# ---- stored forms ----


def test_log8_scales_are_within_half_a_step_and_keep_zero() -> None:
    scales = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)) * 0.3 + 1e-2
    scales[3, 2] = 0
    codes, exponent = log8_encode(scales)
    decoded = log8_decode(codes, exponent)
    assert codes.dtype == torch.uint8
    assert decoded[3, 2] == 0
    assert float((torch.log2(decoded[scales > 0] / scales[scales > 0])).abs().max()) <= 0.5 / 32 + 1e-6
    again, same = log8_encode(decoded)
    assert torch.equal(again, codes)
    assert same == exponent
    assert torch.equal(log8_rounded(scales), decoded)


def test_log8_bytes_by_hand() -> None:
    codes, exponent = log8_encode(torch.tensor([[1.0, 0.5, 2.0**-0.25, 0.0, 1e-9]]))
    assert exponent == 0
    assert codes.tolist() == [[0, 32, 8, 255, 254]]
    code = TritPlanes.encode(
        torch.tensor([[[1, -1]], [[1, 0]]], dtype=torch.int8), torch.tensor([[0.5]]), 2, tied=True, scale_dtype="log8",
        weights=(3, 2),
    )  # fmt: skip
    assert code.decode().tolist() == [[2.5, -1.5]]
    assert code.spec["weights"] == [3, 2]
    assert code.tensors()["scale_exponent"].tolist() == [-1]
    assert code.nbytes == 2 + 1 + 1


def test_bits_of_the_presets() -> None:
    assert THREE_TWO.model_copy(update={"group_size": 32}).quantize(
        torch.randn(40, 256)
    ).bits_per_weight == pytest.approx(3.45, abs=1e-3)
    one = TritPlaneGrid(planes=1, group_size=32, scale_dtype="log8", fitting="weighted")
    assert one.quantize(torch.randn(40, 256)).bits_per_weight == pytest.approx(1.85, abs=1e-3)


@pytest.mark.parametrize(
    "change", [{"weights": [3]}, {"weights": [3, 0]}, {"weights": [3, 2], "tied": False}, {"weights": 3}]
)
def test_wrong_specs_are_refused(change: dict[str, object]) -> None:
    code = THREE_TWO.quantize(torch.randn(4, 16))
    with pytest.raises(ValueError, match="weights"):
        code_from(code.spec | change, code.tensors())
