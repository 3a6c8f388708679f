"""Codes whose digits are trained: they begin as they were given, go to the nearest levels, and gradients go through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.methods.quantize.choosing import choice_on
from featherweight.methods.quantize.decoding import TunableCode, scales_by_plane
from featherweight.methods.quantize.latent import LATENTS, LatentCode, moved_digits
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import ungrouped
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sum import Sum

GRIDS: dict[str, dict[str, Any]] = {
    "one plane": {"kind": "trit-planes", "planes": 1, "group_size": 32},
    "two planes": {"kind": "trit-planes", "planes": 2, "group_size": 32},
    "three planes": {"kind": "trit-planes", "planes": 3, "group_size": 16},
    "tied 3:1": {"kind": "trit-planes", "planes": 2, "group_size": 32, "tied": True},
    "tied 3:2": {"kind": "trit-planes", "planes": 2, "group_size": 32, "tied": True}
    | {"tied_ratio": "3:2", "fitting": "weighted"},
    "log8": {"kind": "trit-planes", "planes": 2, "tied": True, "group_size": 32, "scale_dtype": "log8"},
    "offset": {"kind": "offset-trits", "group_size": 32},
    "4 bits": {"kind": "uniform", "bits": 4, "group_size": 32},
    "3 bits symmetric": {"kind": "uniform", "bits": 3, "group_size": 32, "symmetric": True},
    "8 bits": {"kind": "uniform", "bits": 8, "group_size": 64},
    "sherry": {"kind": "sherry", "group_size": 64},
    "sherry in lanes": {"kind": "sherry", "group_size": 64, "lane_stride": 16},
    "absmean": {"kind": "ternary", "group_size": 32, "scaling": "absmean"},
}
COLUMNS = 120  # no whole number of groups


SHIFT = {"8 bits": 0.02, "4 bits": 0.2}
"""How far error feedback has moved weights before they were rounded, of their deviation: a step or two."""


def weight_of(columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(24, columns, generator=torch.Generator().manual_seed(seed))


def code_of(name: str, weight: Tensor) -> Code:
    grid = choice_on("grid", GRIDS[name])
    return grid.quantize(weight)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", GRIDS)
def test_the_first_code_is_the_given_one(name: str) -> None:
    """Also where the code is not the nearest: digits that an error-compensating rounding chose."""
    weight = weight_of()
    code = code_of(name, weight + 0.4 * weight_of(seed=1))
    latent = LatentCode(code, weight)
    assert latent.trains
    assert torch.equal(latent.stored(latent.parameters).decode(), code.decode())
    assert torch.allclose(latent.decode(latent.parameters), code.decode(), atol=1e-6)
    assert moved_digits(code, latent.stored(latent.parameters))[0] == 0


@pytest.mark.parametrize("name", GRIDS)
def test_latent_values_lie_between_level_and_weight(name: str) -> None:
    weight = weight_of()
    code = code_of(name, weight + SHIFT.get(name, 0.4) * weight_of(seed=1))
    latents = ungrouped(LatentCode(code, weight).parameters[LATENTS], COLUMNS)
    now = code.decode()
    assert bool(((latents - now).abs() <= (weight - now).abs() + 1e-5).all())
    nearer = (latents - weight).abs() < (now - weight).abs() - 1e-6
    assert float(nearer.float().mean()) > 0.5  # most of them have left their level


@pytest.mark.parametrize("name", GRIDS)
def test_digits_are_the_nearest_by_brute_force(name: str) -> None:
    """No level of any weight's group is nearer to its value than the one it gets."""
    if name.startswith("sherry"):
        pytest.skip("a quartet is chosen as a whole: see the test of quartets")
    code = code_of(name, weight_of())
    own = {field: getattr(code, field).float() for field in code.tunable_fields()}
    scales = scales_by_plane(own)
    digits = code.digits()
    assert digits is not None
    values = torch.randn(digits.shape[1:], generator=torch.Generator().manual_seed(3)) * 1.5
    found = code.digits_nearest(values, scales)
    made = (found.float() * scales.movedim(-1, 0).unsqueeze(-1)).sum(0)
    for row in (0, 7):
        for group in range(digits.shape[2]):
            levels = torch.tensor(code.group_levels(row, group))
            best = (values[row, group].unsqueeze(-1) - levels).abs().amin(-1)
            assert torch.allclose((values[row, group] - made[row, group]).abs(), best, atol=1e-5)


@pytest.mark.parametrize("name", ["sherry", "sherry in lanes"])
def test_quartets_lose_their_least(name: str) -> None:
    """Of all codes of a quartet none is nearer: the one zero goes to the smallest, the others keep their signs."""
    code = code_of(name, weight_of(128))
    scales = code.scales.float().unsqueeze(-1)  # type: ignore[attr-defined]
    values = weight_of(128, seed=5)
    grouped = values.view(24, -1, 64)
    trits = ungrouped(code.digits_nearest(grouped, scales), 128)[0].float()
    wide = scales[..., 0].repeat_interleave(64, 1)
    stride = code.lane_stride  # type: ignore[attr-defined]
    error = (values - wide * trits).square().view(24, -1, 4, stride).sum(2)
    for zero in range(4):
        for signs in range(16):
            other = torch.tensor([1.0 if signs >> lane & 1 else -1.0 for lane in range(4)])
            other[zero] = 0
            tried = other.view(1, 1, 4, 1).expand(24, 128 // (4 * stride), 4, stride).reshape(24, 128)
            assert bool((error <= (values - wide * tried).square().view(24, -1, 4, stride).sum(2) + 1e-5).all())


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_go_straight_through(name: str) -> None:
    """A latent value has the gradient of its weight; scales that of the product with the digits of the moment."""
    code = code_of(name, weight_of())
    latent = LatentCode(code, weight_of())
    values = {path: value.clone().requires_grad_() for path, value in latent.parameters.items()}
    upstream = weight_of(seed=9)
    latent.decode(values).backward(upstream)
    gradient = values[LATENTS].grad
    assert gradient is not None
    assert torch.equal(ungrouped(gradient, COLUMNS), upstream)
    fixed = TunableCode(code)
    tuned = {path: value.clone().requires_grad_() for path, value in fixed.parameters.items()}
    fixed.decode(tuned).backward(upstream)
    for path, value in tuned.items():
        assert value.grad is not None
        assert values[path].grad is not None
        assert torch.allclose(values[path].grad, value.grad, atol=1e-4)  # type: ignore[arg-type]


def test_digits_follow_their_values() -> None:
    code = code_of("one plane", weight_of())
    latent = LatentCode(code, weight_of())
    values = latent.parameters
    values[LATENTS] = -values[LATENTS]
    turned = latent.stored(values)
    assert torch.allclose(turned.decode(), -code.decode(), atol=1e-3)
    changed, count = moved_digits(code, turned)
    digits = code.digits()
    assert digits is not None
    assert (changed, count) == (int((ungrouped(digits, COLUMNS) != 0).sum()), 24 * COLUMNS)


def test_what_is_around_the_digits_is_seen_through() -> None:
    """A rotation turns the weight before latent values start at it; terms beside the digits are taken from it."""
    weight = weight_of(128)
    inner = code_of("two planes", weight)
    for code, wanted in (
        (Hadamard(inner, 64, 0), None),
        (Sum.of(inner, LowRank.encode(0.1 * weight_of(2), 0.1 * torch.randn(2, 128))), "sum"),
    ):
        latent = LatentCode(code, weight)
        assert latent.trains
        assert torch.equal(latent.stored(latent.parameters).decode(), code.decode())
        path = next(path for path in latent.parameters if path.endswith(LATENTS))
        assert path == ("terms.0.latents" if wanted else "inner.latents")
        assert latent.units.keys() == {path}
        leaf, seen, _ = code.opened(weight)
        latents = ungrouped(latent.parameters[path], 128)
        now = leaf.decode()
        assert bool(((latents - now).abs() <= (seen - now).abs() + 1e-5).all())


def test_kinds_that_keep_their_digits_train_the_rest() -> None:
    weight = weight_of(128)
    grid = choice_on("grid", {"kind": "codebook", "bits": 3})
    code = grid.quantize(weight)  # type: ignore[attr-defined]
    latent = LatentCode(code, weight)
    assert not latent.trains
    assert latent.parameters.keys() == TunableCode(code).parameters.keys()
    with pytest.raises(NotImplementedError, match="codes of the kind codebook keep their digits"):
        code.with_digits(torch.zeros(1))
