"""The search for a clip: a brute force in float64, and the native library bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.native import clip_search, library
from featherweight.native.clip_search import least_error, raised

NATIVE = library.get()
needs_native = pytest.mark.skipif(
    NATIVE is None or clip_search._native() is None, reason="the native library is not built"
)
ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    yield
    if NATIVE is not None:
        NATIVE.select_isa("auto")


def trials_of(groups: Tensor, count: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ranges of 1, 0.98, ... times the extremes: scales in float16, zero points."""
    steps = (1 << bits) - 1
    shares = (1 - torch.arange(count) / 50).view(-1, 1, 1)
    low, high = groups.amin(-1).clamp(max=0) * shares, groups.amax(-1).clamp(min=0) * shares
    if symmetric:
        scales = 2 * torch.maximum(-low, high) / steps
        return scales.half(), torch.full_like(scales, 1 << (bits - 1))
    scales = (high - low) / steps
    return scales.half(), (-low / scales.clamp(min=1e-30)).round().clamp(0, steps)


def errors(
    groups: Tensor, scales: Tensor, zero_points: Tensor, bits: int, exponent: float, counted: Tensor | None
) -> Tensor:
    """[trials, rows, groups] in float64."""
    v, s, z = groups.double(), scales.double().unsqueeze(-1), zero_points.double().unsqueeze(-1)
    codes = (torch.where(s > 0, v / s, torch.zeros_like(v * s)).round() + z).clamp(0, (1 << bits) - 1)
    missed = (v - (codes - z) * s).abs().pow(exponent)
    return (missed if counted is None else missed * counted.double()).sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 150)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    exponent=st.sampled_from([0.5, 1.0, 2.0, 2.4, 4.0, 8.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chosen_error_is_the_least_of_all(
    shape: tuple[int, int, int], bits: int, symmetric: bool, exponent: float, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(shape, generator=generator)
    counted = torch.rand(1, *shape[1:], generator=generator) if weighted else None
    scales, zero_points = trials_of(groups, 30, bits, symmetric)
    wanted = errors(groups, scales, zero_points, bits, exponent, counted)
    for backend in ("reference", "auto"):
        chosen = least_error(
            groups, scales, zero_points, (1 << bits) - 1, exponent, counted, threads=1, backend=backend
        )  # type: ignore[arg-type]
        found = wanted.gather(0, chosen.unsqueeze(0)).squeeze(0)
        # errors far below the weights are themselves known to float32's rounding of the weights only
        slack = 1e-6 * found + (groups.abs().amax(-1).double() * 1e-6).pow(exponent) * shape[2]
        assert torch.all(found <= wanted.amin(0) + slack)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 3, 15, 16, 17, 64, 100, 128, 1000])),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    exponent=st.sampled_from([0.1, 1.0, 2.0, 2.4, 3.0, 8.0]),
    weighted=st.booleans(),
    size=st.sampled_from([1.0, 1e-38, 1e-6, 1e30]),
)
def test_native_choice_is_the_reference_on_all_instructions_and_threads(
    shape: tuple[int, int, int], bits: int, symmetric: bool, exponent: float, weighted: bool, size: float
) -> None:
    assert NATIVE is not None
    generator = torch.Generator().manual_seed(sum(shape))
    groups = torch.randn(shape, generator=generator) * size
    groups[0, 0] = 0
    counted = torch.rand(1, *shape[1:], generator=generator) if weighted else None
    scales, zero_points = trials_of(groups, 40, bits, symmetric)
    if size != 1:
        scales = scales.float() + groups.abs().amax(-1) / (1 << bits)
    highest = (1 << bits) - 1
    wanted = least_error(groups, scales, zero_points, highest, exponent, counted, backend="reference")
    for isa in ISAS:
        try:
            NATIVE.select_isa(isa)
        except ValueError:
            continue
        for threads in (1, 3):
            found = least_error(
                groups, scales, zero_points, highest, exponent, counted, threads=threads, backend="native"
            )
            assert torch.equal(found, wanted), isa


@needs_native
def test_groups_without_an_error_take_the_first_trial() -> None:
    groups = torch.randn(3, 2, 20)
    groups[0, 1, 5], groups[1, 0, 0], groups[2, 1, 19] = torch.nan, torch.inf, -torch.inf
    scales = torch.rand(6, 3, 2) + 0.1
    scales[:, 2, 0] = torch.inf
    scales[2:4, 0, 0] = 0
    zero_points = torch.full((6, 3, 2), 4.0)
    wanted = least_error(groups, scales, zero_points, 7, backend="reference")
    assert torch.equal(least_error(groups, scales, zero_points, 7, backend="native"), wanted)
    assert [int(wanted[place]) for place in ((0, 1), (1, 0), (2, 1), (2, 0))] == [0, 0, 0, 0]


@pytest.mark.parametrize("exponent", [0.1, 1.0, 2.4, 3.0, 8.0])
def test_power_is_accurate_and_rises(exponent: float) -> None:
    missed = torch.logspace(-8, 0, 20_001)
    squared = missed.square()
    found = raised(squared, exponent / 2 - 1)
    wanted = squared.double().pow(exponent / 2)
    normal = wanted > 1e-36
    assert torch.allclose(found[normal].double(), wanted[normal], rtol=2e-7 + 4e-6 * abs(exponent / 2 - 1), atol=0)
    assert torch.all(found.diff()[normal[1:]] > 0)
    assert raised(torch.zeros(3), exponent / 2 - 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": "mse", "clip_exponent": 2.4},
        {"clip": "mse", "symmetric": True, "convention": "quarot", "clip_exponent": 2.4},
        {"clip": "mse", "weighting": "gram"},
        {"clip": "omse", "symmetric": True},
        {"clip": "mse", "axis": "output", "group_size": 1, "output_group_size": 9},
    ],
)
def test_a_search_in_parts_is_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(23, 70)
    grid = UniformGrid(bits=3, **{"group_size": 32, **changes})
    statistics = {"gram": torch.diag(torch.rand(70))}
    whole = grid.fit(weight, statistics)
    monkeypatch.setattr("featherweight.methods.quantize.grids.uniform.SEARCHED_TOGETHER", 100)
    parts = grid.fit(weight, statistics)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert whole["scales"].shape == (23, 3 if grid.axis == "input" else 70)


@needs_native
def test_what_the_library_refuses() -> None:
    groups, scales = torch.ones(1, 1, 4), torch.ones(2, 1, 1)
    for highest, exponent in ((0, 2.0), (256, 2.0), (7, 0.0), (7, 9.0)):
        with pytest.raises(ValueError, match="refused"):
            least_error(groups, scales, torch.zeros(2, 1, 1), highest, exponent, backend="native")
