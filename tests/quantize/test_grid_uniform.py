"""What the uniform grid has beside min-max and least squares: OMSE, conventions, weights, per-column groups."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.storage.codes.uniform import Uniform


def exact(**settings: object) -> UniformGrid:
    return UniformGrid(**{"scale_dtype": "float32", **settings})  # type: ignore[arg-type]


def relative(grid: UniformGrid, weight: Tensor) -> float:
    return float((grid.quantize(weight).decode() - weight).norm() / weight.norm())


def test_omse_is_the_best_of_its_ratios_and_no_worse_than_none() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    found = ((exact(bits=4, symmetric=True, clip="omse").quantize(weight).decode() - weight) ** 2).sum(1)
    trials = []
    for ratio in [0.35 + 0.65 * i / 100 for i in range(101)]:
        scale = ratio * weight.abs().amax(1, keepdim=True) / 7
        trials.append((((weight / scale).round().clamp(-8, 7) * scale - weight) ** 2).sum(1))
    assert torch.allclose(found, torch.stack(trials).amin(0), rtol=1e-5)
    assert torch.all(found <= trials[-1])
    finer = torch.stack(
        [
            (((weight / s).round().clamp(-8, 7) * s - weight) ** 2).sum(1)
            for s in (weight.abs().amax(1, keepdim=True) / 7 * r for r in torch.linspace(0.35, 1, 3001))
        ]
    ).amin(0)
    assert torch.all(found <= finer * 1.05)


def test_omse_clips_four_bits_and_hardly_eight() -> None:
    weight = torch.randn(20, 2000, generator=torch.Generator().manual_seed(1))
    for bits, low, high in ((4, 0.4, 0.85), (8, 0.93, 1.0)):
        fit = exact(bits=bits, symmetric=True, clip="omse", group_size=2000).fit(weight)
        ratio = fit["scales"] * ((1 << (bits - 1)) - 1) / weight.abs().amax(1, keepdim=True)
        assert low <= float(ratio.mean()) <= high


def test_omse_takes_the_smaller_of_equally_good_ranges() -> None:
    weight = torch.zeros(1, 16)  # nothing to lose at any ratio: the first is kept, and its scale is clamped
    assert exact(bits=4, symmetric=True, clip="omse").fit(weight)["scales"].item() == pytest.approx(1e-5)
    weight = torch.tensor([[0.7, -0.7] * 8])  # only the whole range is without loss
    assert exact(bits=4, symmetric=True, clip="omse").fit(weight)["scales"].item() == pytest.approx(0.1)


def test_conventions_of_symmetric_scales() -> None:
    weight = torch.tensor([[-1.5, 0.4, 0.6, 1.5]])
    scales = {
        c: exact(bits=4, symmetric=True, convention=c).fit(weight)["scales"].item() for c in ("gptq", "quarot", "flexq")
    }
    assert scales["gptq"] == pytest.approx(3 / 15)
    assert scales["quarot"] == pytest.approx(1.5 / 7)
    assert scales["flexq"] == pytest.approx(1.5 / 7)
    tiny = weight * 1e-6
    assert exact(bits=4, symmetric=True, convention="flexq").fit(tiny)["scales"].item() == pytest.approx(1e-5)
    assert exact(bits=4, symmetric=True, convention="quarot").fit(tiny)["scales"].item() < 1e-6


def test_flexq_is_idempotent_odd_and_misses_half_a_step_at_most() -> None:
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(2)) * 0.02
    grid = UniformGrid(bits=6, symmetric=True, convention="flexq")
    code = grid.quantize(weight)
    assert isinstance(code, Uniform)
    assert torch.equal(grid.quantize(code.decode()).decode(), code.decode())
    assert torch.equal(grid.quantize(-weight).decode(), -code.decode())
    assert int(code.unpack()[0].min()) >= 1  # the lowest code is never reached
    assert torch.all((code.decode() - weight).abs() <= code.scales.float() * 0.5 * 1.03)  # fp16 scales: 31 x 2^-11
    assert relative(grid, weight) == pytest.approx(0.0265, abs=0.0005)
    assert code.bits_per_weight == 6.125


def test_activation_weights_choose_the_range() -> None:
    """Where one column counts alone, its error decides; equal weights change nothing."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    plain, weighted = (
        exact(bits=3, clip="mse", group_size=64),
        exact(bits=3, clip="mse", group_size=64, weighting="gram"),
    )
    assert weighted.needs == ("gram",)
    assert plain.needs == exact(weighting="gram").needs == ()
    same = weighted.quantize(weight, {"gram": torch.eye(64) * 0.5})
    assert torch.equal(same.decode(), plain.quantize(weight).decode())
    assert torch.equal(weighted.quantize(weight).decode(), plain.quantize(weight).decode())  # without statistics
    importance = torch.full((64,), 1e-4)
    importance[7] = 1.0
    gram = torch.diag(importance)
    errors = [
        ((grid.quantize(weight, {"gram": gram}).decode() - weight) ** 2 * importance).sum()
        for grid in (weighted, plain)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_higher_exponent_shrinks_the_range_less() -> None:
    weight = torch.randn(200, 128, generator=torch.Generator().manual_seed(4))
    two, more = (exact(bits=3, clip="mse", clip_exponent=p).fit(weight)["scales"].mean() for p in (2.0, 4.0))
    assert more > two


def per_column(**settings: object) -> UniformGrid:
    return exact(axis="output", group_size=1, **settings)


def test_per_column_groups_commute_with_column_scaling_and_per_row_groups_do_not() -> None:
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    columns, rows = 2.0 ** torch.randint(-3, 4, (24,)), 2.0 ** torch.randint(-3, 4, (64, 1))
    inside, along = per_column(bits=3, output_group_size=32), exact(bits=3, group_size=12)
    assert torch.equal(inside.quantize(weight * columns).decode(), inside.quantize(weight).decode() * columns)
    assert not torch.allclose(inside.quantize(weight * rows).decode(), inside.quantize(weight).decode() * rows)
    assert torch.equal(along.quantize(weight * rows).decode(), along.quantize(weight).decode() * rows)
    assert not torch.allclose(along.quantize(weight * columns).decode(), along.quantize(weight).decode() * columns)


def test_per_column_is_the_transpose_of_per_row() -> None:
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(6))
    for settings in ({}, {"symmetric": True}, {"clip": "mse", "clip_steps": 20}):
        inside = per_column(bits=3, output_group_size=32, **settings).quantize(weight)
        along = exact(bits=3, group_size=32, **settings).quantize(weight.T.contiguous())
        assert torch.equal(inside.decode(), along.decode().T)
        assert inside.nbytes == along.nbytes


def test_scaled_columns_want_groups_inside_them() -> None:
    generator = torch.Generator().manual_seed(7)
    gaussian = torch.randn(256, 256, generator=generator)
    scaled = gaussian * torch.exp(torch.randn(256, generator=generator))
    along, inside = exact(bits=3, group_size=64), per_column(bits=3, output_group_size=64)

    def squared(grid: UniformGrid, weight: Tensor) -> float:
        return relative(grid, weight) ** 2

    assert squared(along, gaussian) == pytest.approx(0.038, abs=0.004)
    assert squared(inside, gaussian) == pytest.approx(0.038, abs=0.004)
    assert squared(inside, scaled) == pytest.approx(0.038, abs=0.006)
    assert squared(along, scaled) > 1.4 * squared(inside, scaled)
    assert squared(along, scaled.T.contiguous()) < squared(inside, scaled.T.contiguous()) / 1.4


def test_a_whole_column_in_one_group_misses_half_a_step() -> None:
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(8))
    code = per_column(bits=8, output_group_size=40).quantize(weight)
    step = (weight.amax(0) - weight.amin(0)) / 255
    # an integer zero point moves the range by up to half a step
    assert torch.all((code.decode() - weight).abs() <= step * 1.001)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="symmetric: true"):
        UniformGrid(clip="omse")
    with pytest.raises(ValidationError, match="symmetric: true"):
        UniformGrid(convention="flexq")
    with pytest.raises(ValidationError, match="group_size: 1"):
        UniformGrid(axis="output", group_size=128)
