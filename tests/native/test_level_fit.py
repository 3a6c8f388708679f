"""One scale for levels: a fixed point of rounding and least squares, near the best there is; native bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.native import level_fit, library
from featherweight.native.level_fit import fit_levels, fit_levels_reference

NATIVE = library.get()
needs_native = pytest.mark.skipif(
    NATIVE is None or level_fit._native() is None, reason="the native library is not built"
)
ISAS = ("baseline", "avx2", "avx512")
LEVELS = ((-1.0, 0.0, 1.0), (-5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0), (-1.0, 1.0), (0.0, 1.0, 4.0, 5.0))


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    yield
    if NATIVE is not None:
        NATIVE.select_isa("auto")


def missed(values: Tensor, counted: Tensor, levels: Tensor, scale: float) -> float:
    """What a group misses with a scale, in float64."""
    points = scale * levels.double()
    nearest = (values.double().unsqueeze(-1) - points).abs().amin(-1)
    return float((nearest.square() * counted.double()).sum())


def least_squares(values: Tensor, counted: Tensor, levels: Tensor, scale: float) -> float:
    """The best scale for the levels nearest with this one, in float64."""
    digits = levels.double()[(values.double().unsqueeze(-1) - scale * levels.double()).abs().argmin(-1)]
    return float((counted.double() * digits * values.double()).sum() / (counted.double() * digits.square()).sum())


@pytest.mark.parametrize("chosen", LEVELS)
def test_it_ends_where_neither_codes_nor_scale_move(chosen: tuple[float, ...]) -> None:
    levels, values, counted = torch.tensor(chosen), torch.randn(20, 3, 37), torch.rand(3, 37)
    start = torch.full((20, 3), 1.2 / max(abs(x) for x in chosen))
    scales, errors = fit_levels(values, counted, levels, start, 100)
    for row in range(20):
        for group in range(3):
            scale = float(scales[row, group])
            own = missed(values[row, group], counted[group], levels, scale)
            assert float(errors[row, group]) == pytest.approx(own, rel=1e-4)
            assert own <= missed(values[row, group], counted[group], levels, float(start[row, group])) * (1 + 1e-6)
            assert scale == pytest.approx(least_squares(values[row, group], counted[group], levels, scale), rel=1e-5)


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 70)),
    levels=st.sampled_from(LEVELS),
    rounds=st.integers(0, 9),
    factor=st.sampled_from([-0.5, 0.0, 0.01, 0.4, 3.0]),
    seed=st.integers(0, 1000),
    zeros=st.booleans(),
    threads=st.integers(1, 3),
)
@needs_native
def test_the_same_bits(
    shape: tuple[int, int, int],
    levels: tuple[float, ...],
    rounds: int,
    factor: float,
    seed: int,
    zeros: bool,
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    counted = torch.rand(shape[1:], generator=generator)
    if zeros:
        values[0], counted[0] = 0, 0
    start = torch.rand(shape[:2], generator=generator) * factor
    wanted = fit_levels_reference(values, counted, torch.tensor(levels), start, rounds)
    assert NATIVE is not None
    for isa in ISAS:
        if isa not in NATIVE.isas():
            continue
        NATIVE.select_isa(isa)
        found = fit_levels(values, counted, torch.tensor(levels), start, rounds, threads=threads, backend="native")
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), isa


def test_what_does_not_fit_is_refused() -> None:
    values, counted, levels, scales = (
        torch.zeros(2, 3, 4),
        torch.zeros(3, 4),
        torch.tensor([-1.0, 1.0]),
        torch.ones(2, 3),
    )
    with pytest.raises(ValueError, match="do not fit"):
        fit_levels(values, counted[:2], levels, scales, 1)
    with pytest.raises(ValueError, match="ascending"):
        fit_levels(values, counted, levels.flip(0), scales, 1)
    assert fit_levels(values[:0], counted, levels, scales[:0], 1)[0].shape == (0, 3)
