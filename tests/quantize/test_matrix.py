"""The matrix: what every registered grid, preset and code must satisfy. New registrations are taken in unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from featherweight.methods.quantize.base import Grid, HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.binary_planes import BinaryPlaneGrid
from featherweight.methods.quantize.grids.codebook import CodebookGrid
from featherweight.methods.quantize.grids.dual_scale import DualScaleGrid
from featherweight.methods.quantize.grids.factors import FactorsGrid
from featherweight.methods.quantize.grids.offset_trits import OffsetTritGrid
from featherweight.methods.quantize.grids.ternary import TernaryGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.recipe import load_recipe, presets
from featherweight.registry import registered
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code, code_from, code_layout
from featherweight.tasks.compress.methods import choices_table, cost_text, method_table

Quantised = Callable[[Grid, tuple[int, int]], Code]

# Whole groups, a short last group, a row shorter than a group, rows that end inside a packed byte, a single column.
SHAPES = [(24, 256), (7, 200), (5, 96), (43, 131), (3, 1)]
GRIDS = {name: load_recipe(name).grid for name in presets()} | {name: cls() for name, cls in registered("grid").items()}
GRIDS["one-tied-plane"] = TritPlaneGrid(planes=1, tied=True)
GRIDS["symmetric"] = UniformGrid(bits=3, symmetric=True)
GRIDS |= {
    "symmetric-quarot": UniformGrid(bits=3, symmetric=True, convention="quarot"),
    "omse": UniformGrid(bits=4, symmetric=True, clip="omse"),
    "per-column": UniformGrid(bits=3, axis="output", group_size=1, output_group_size=16),
    "per-column-symmetric": UniformGrid(bits=3, axis="output", group_size=1, output_group_size=5, symmetric=True),
    "offset-trits-init": OffsetTritGrid(fitting="init", group_size=64, packing="2bit"),
    "absmean": TernaryGrid(scaling="absmean"),
    "twn-optimal": TernaryGrid(scaling="optimal", group_size=32),
    "shifts-of-columns": BinaryPlaneGrid(bits=3, terms=3, group_size=1, rows_per_scale="all", rounds=10),
    "shifts-of-strips": BinaryPlaneGrid(bits=2, terms=3, group_size=8, strips=8, rounds=10),
    "binary-planes-of-rows": BinaryPlaneGrid(bits=2, group_size=16, rows_per_scale=6, rounds=10),
    "dual-scale-3": DualScaleGrid(bits=3, group_size=32, iterations=5),
    "codebook-of-groups": CodebookGrid(bits=3, group_size=64, start="quantiles"),
    "codebook-exact": CodebookGrid(bits=1, group_size=128, exact=True),
}


def distinct(grids: dict[str, Grid]) -> dict[str, Grid]:
    """Grids that presets share once, under the first of their names."""
    kept: dict[str, Grid] = {}
    for name, grid in grids.items():
        if not any(type(other) is type(grid) and other == grid for other in kept.values()):
            kept[name] = grid
    return kept


DISTINCT = distinct(GRIDS)
QUANTISING = {name: grid for name, grid in DISTINCT.items() if grid.kind != "dense"}


def gaussian(shape: tuple[int, int], seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def through_a_file(code: Code, folder: Path) -> Code:
    """Store a code and read it back from spec (as JSON) and file."""
    path = folder / "code.safetensors"
    write_safetensors(path, [blob_of(name, tensor) for name, tensor in code.tensors().items()], {})
    with SafetensorsFile.open(path) as file:
        return code_from(json.loads(json.dumps(code.spec)), {name: file.tensor(name) for name in file.entries})


def clamped(grid: Grid) -> bool:
    """The published rule keeps scales above 1e-5, which loses smaller weights."""
    return isinstance(grid, UniformGrid) and grid.clamped


def powers_of_two(grid: Grid) -> bool:
    return isinstance(grid, BinaryPlaneGrid) and grid.terms > 0


def without_levels(grid: Grid) -> bool:
    """Vectors, and sums of factored blocks, have no list of levels of single weights."""
    return grid.columns_jointly > 1 or type(grid).levels is Grid.levels


@pytest.fixture(params=sorted(DISTINCT))
def grid(request: pytest.FixtureRequest) -> Grid:
    return DISTINCT[request.param]


@pytest.fixture(scope="module")
def quantised() -> Quantised:
    """The code of a Gaussian matrix of a shape, by grid; each made once."""
    made: dict[tuple[str, tuple[int, int]], Code] = {}

    def code_of(grid: Grid, shape: tuple[int, int]) -> Code:
        name = next(name for name, other in DISTINCT.items() if other is grid)
        if (name, shape) not in made:
            made[name, shape] = grid.quantize(gaussian(shape))
        return made[name, shape]

    return code_of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_code_survives_a_file_and_counts_its_bytes(
    grid: Grid, shape: tuple[int, int], quantised: Quantised, tmp_path: Path
) -> None:
    code = quantised(grid, shape)
    again = through_a_file(code, tmp_path)
    assert again.spec == code.spec
    assert torch.equal(again.decode(), code.decode())
    assert code.decode().shape == shape
    assert code.decode().dtype == torch.float32
    layout = code_layout(code.spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in code.tensors().items()} == {
        n: (tuple(entry.shape), entry.dtype) for n, entry in layout.items()
    }
    with SafetensorsFile.open(tmp_path / "code.safetensors") as file:
        assert code.nbytes == sum(entry.nbytes for entry in file.entries.values())
        assert code.nbytes == sum(entry.nbytes for entry in layout.values())
    assert code.bits_per_weight == 8 * code.nbytes / (shape[0] * shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_planned_spec_is_the_spec_that_comes_out(grid: Grid, shape: tuple[int, int], quantised: Quantised) -> None:
    assert quantised(grid, shape).spec == grid.spec(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_decoded_alone_as_in_the_whole(grid: Grid, shape: tuple[int, int], quantised: Quantised) -> None:
    code = quantised(grid, shape)
    whole = code.decode()
    for first in range(0, shape[0], 2):
        for last in (first + 1, shape[0]):
            assert torch.equal(code.decode_rows(first, last), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_windows_and_threads_do_not_change_the_code(grid: Grid, dtype: torch.dtype) -> None:
    weight = gaussian((123, 200)).to(dtype)
    whole = grid.quantize(weight.float())
    for window_bytes, threads in ((1, 1), (40 * 200 * 4, 2), (1 << 20, 3)):
        options = SolveOptions(threads=threads, window_bytes=window_bytes)
        windowed = grid.quantize_source(HeldWeight(weight), options)
        assert windowed.spec == whole.spec
        for name, tensor in whole.tensors().items():
            assert torch.equal(windowed.tensors()[name], tensor), (window_bytes, name)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.25, 2.0**-20, 3e4])
def test_zero_and_constant_groups(grid: Grid, value: float) -> None:
    weight = torch.full((4, 150), value)
    decoded = grid.quantize(weight).decode()
    if value == 0:
        assert torch.equal(decoded, weight)
    elif grid.columns_jointly > 1:  # the points of a vector grid need not include constant vectors
        assert decoded.isfinite().all()
    elif clamped(grid) and abs(value) < 1e-4:
        assert torch.all((decoded - weight).abs() <= 1e-5)
    elif powers_of_two(grid):  # three terms miss a number by (sqrt 2 - 1)^3 at most, and there are several planes
        assert torch.allclose(decoded, weight, rtol=0.02)
    elif isinstance(grid, FactorsGrid) and grid.dictionary_bits < 16:  # two factors with top levels half a step short
        assert torch.allclose(decoded, weight, rtol=1.02 / (2**grid.dictionary_bits - 1) * 2)
    elif isinstance(grid, UniformGrid) and grid.symmetric:  # its top level is half a step short of the largest weight
        assert torch.all((decoded - weight).abs() <= abs(value) * 1.01 / (2**grid.bits - 1))
    else:  # a constant group needs one level only; fp16 rounds the scale by at most 2^-11, tied sums of it by as much
        assert torch.allclose(decoded, weight, rtol=2e-3)


@pytest.mark.parametrize("std", [1e-30, 1e-12, 1e-5, 1e3, 1e30])
def test_tiny_and_huge_groups_keep_their_relative_error(std: float) -> None:
    for name, grid in QUANTISING.items():
        if isinstance(grid, TritPlaneGrid):  # the published stopping rule is absolute: below it the loop hardly runs
            assert (grid.quantize(gaussian((8, 256)) * std).decode() - gaussian((8, 256)) * std).isfinite().all()
            grid = grid.model_copy(update={"tolerance_relative": True})
        if grid.kind == "sign-factor":  # of eight rows its rank leaves nothing but rounding
            grid = grid.model_copy(update={"rank": 2})
        if clamped(grid) or (powers_of_two(grid) and not 1e-12 <= std <= 1e3):  # out of reach: see their own tests
            continue
        usual, extreme = gaussian((8, 256), std=1.0), gaussian((8, 256), std=1.0) * std
        expected = (grid.quantize(usual).decode() - usual).norm() / usual.norm()
        found = (grid.quantize(extreme).decode() - extreme).double().norm() / extreme.double().norm()
        assert found == pytest.approx(float(expected), rel=0.12), name


def test_groups_of_very_different_size_in_one_matrix() -> None:
    for name, grid in QUANTISING.items():
        # groups straddle the parts; vectors share a row's amplitudes; factors are those of whole columns
        if 128 % grid.group_size or grid.kind in ("pyramid", "sign-factor"):
            continue
        weight = torch.cat([gaussian((4, 128), std=1.0), gaussian((4, 128), std=1e-4), torch.zeros(4, 128)], dim=1)
        decoded = grid.quantize(weight).decode()
        for part, limit in ((slice(0, 128), 0.65), (slice(128, 256), 0.65)):
            error = (decoded[:, part] - weight[:, part]).norm() / weight[:, part].norm()
            assert error < limit, name
        assert torch.equal(decoded[:, 256:], weight[:, 256:]), name


def test_nearest_is_nearest() -> None:
    """Each decoded value is a level of its group, and no other level is nearer to the weight."""
    for name, grid in QUANTISING.items():
        if without_levels(grid) or grid.whole:
            continue
        weight = gaussian((6, 256), seed=3)
        fit = grid.fit(weight)
        levels = grid.levels(fit).double().repeat_interleave(min(grid.group_size, 256), dim=1)[:, :256]  # [out, in, L]
        assert torch.all(levels.diff(dim=-1) >= 0), name
        column_scales = grid.column_scales(fit)
        if column_scales is not None:
            levels = levels * column_scales[:256].double().view(1, -1, 1)
        decoded, values = grid.nearest(weight, fit).decode().double(), weight.double()
        distance = (values.unsqueeze(-1) - levels).abs()
        assert torch.all((decoded.unsqueeze(-1) - levels).abs().amin(-1) <= 1e-8), name
        assert torch.all((values - decoded).abs() <= distance.amin(-1) + 1e-7 * values.abs().amax()), name


def test_encoded_levels_are_what_is_decoded() -> None:
    """`encode` of any choice of levels, not only of the nearest, decodes to these levels."""
    for name, grid in QUANTISING.items():
        if without_levels(grid) or grid.whole:
            continue
        weight = gaussian((11, 150), seed=4)
        fit = grid.fit(weight)
        levels = grid.levels(fit)
        count = levels.shape[-1]
        indices = torch.randint(0, count, weight.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        expected = levels.repeat_interleave(min(grid.group_size, 150), dim=1)[:, :150]
        expected = expected.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
        column_scales = grid.column_scales(fit)
        if column_scales is not None:
            expected = expected * column_scales[:150]
        assert torch.allclose(grid.encode(indices, fit).decode(), expected, rtol=1e-6, atol=1e-9), name


def test_fits_of_windows_of_columns_are_parts_of_the_whole_fit() -> None:
    """A sweep fits a group when it reaches it; dimension 1 of every parameter counts groups of columns."""
    for name, grid in QUANTISING.items():
        # left out: vectors, a stopping rule that looks at all groups, near ties of logarithms
        if without_levels(grid) or grid.whole or isinstance(grid, TritPlaneGrid) or powers_of_two(grid):
            continue
        columns = 300 if grid.group_size > 1 else 20
        weight = gaussian((12, columns), seed=6)
        step = min(grid.group_size, columns)
        parts = [grid.fit(weight[:, j : j + step]) for j in range(0, columns, step)]
        joined = {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}
        for key, value in grid.fit(weight).items():
            assert torch.allclose(joined[key].float(), value.float(), rtol=2e-3), (name, key)


def test_more_bits_less_error() -> None:
    """Across all grids of a kind, a code with more stored bits misses less of a Gaussian matrix."""
    weight = gaussian((64, 1024), seed=5)

    def error(name: str) -> float:
        return float((GRIDS[name].quantize(weight).decode() - weight).norm() / weight.norm())

    for order in (
        ("rtn-2", "rtn-3", "rtn-4", "rtn-8"),
        ("rtn-2-mse", "rtn-3-mse", "rtn-4-mse"),
        ("ptqtp-1", "ptqtp", "ptqtp-3"),
        ("ptqtp-1", "ptqtp-tied", "ptqtp-tied-3"),
    ):
        errors = [error(name) for name in order]
        assert errors == sorted(errors, reverse=True)
        assert all(2 * later < 1.3 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    for bits in (2, 3, 4):
        assert error(f"rtn-{bits}-mse") < error(f"rtn-{bits}")
    assert error("ptqtp-plus") < error("ptqtp")
    for order in (
        ("absmean", "ternary", "twn-optimal"),
        ("ternary", "offset-trits", "dual-scale"),
        ("binary-planes-of-rows", "binary-planes"),
        ("codebook-exact", "codebook-of-groups", "codebook"),
        ("dual-scale", "dual-scale-3"),
    ):
        errors = [error(name) for name in order]
        assert errors == sorted(errors, reverse=True), (order, errors)


def test_every_choice_documents_itself() -> None:
    for row in choices_table():
        assert row["summary"], row["name"]
        for setting in row["settings"]:
            assert setting["description"], (row["name"], setting["name"])


def test_every_preset_is_a_row_of_the_method_table() -> None:
    rows = method_table()
    assert [row["preset"] for row in rows] == list(presets())
    for row in rows:
        assert row["title"]
        assert row["paper"]
    costs = {row["preset"]: cost_text(row) for row in rows}
    assert costs["ptqtp"] == "one tensor"
    assert costs["gptq"] == "one block, 65.5 k tokens"  # 128 windows of 512
    assert costs["rsq"] == "whole model, 1.05 M tokens"  # rotated through the residual stream
    assert costs["squeezellm"].startswith("whole model")  # gradients
    assert costs["flexround"] == "one block, 262 k tokens, 5.12 M trained"  # 5000 steps of two windows
    assert costs["discquant"] == "whole model, 16.8 M tokens, 16.8 M trained"  # 1024 steps of eight, each once
    bits = {row["preset"]: row["bits"] for row in rows}
    assert bits["ptqtp"] == pytest.approx(3.45, abs=1e-4)  # 2 x 1.6 + 2 x 16 / 128
    assert bits["ptqtp-tied"] == pytest.approx(3.325, abs=1e-4)
    assert bits["ptqtp-1"] == pytest.approx(1.725, abs=1e-4)
    assert bits["rtn-4"] == pytest.approx(4 + 20 / 128, abs=1e-4)
