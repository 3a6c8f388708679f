"""Every registered statistic: its axes are those of what is gathered, and it follows a change of basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.methods.calibrate.accumulate import Accumulator
from featherweight.methods.calibrate.statistics import carried, gathered_names, known_statistics, of_columns

IN, TOKENS = 12, 300
NAMES = gathered_names()


def gathered(inputs: Tensor, difference: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """All statistics of these tokens [n, in], added in three parts; the last hundred are held out."""
    accumulator = Accumulator(IN, NAMES, torch.device("cpu"))
    for part in (slice(0, 70), slice(70, 71), slice(71, 200)):
        accumulator.add(inputs[part], weights[part], difference[part])
    accumulator.add_held_out(inputs[200:], weights[200:])
    return accumulator.finish()


@pytest.fixture
def samples() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(TOKENS, IN) + 0.3, 0.1 * draw(TOKENS, IN), torch.rand(TOKENS, generator=generator) + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_dimensions_are_as_declared(name: str, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    value = gathered(*samples)[name]
    sizes = {"in": IN, "tokens": 200}
    assert list(value.shape) == [sizes[axis] for axis in known_statistics()[name].axes]


@pytest.mark.parametrize("name", NAMES)
def test_columns_of_a_statistic_are_the_statistic_of_columns(name: str, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, difference, weights = samples
    order = torch.randperm(IN)
    taken = of_columns(gathered(*samples), order)[name]
    direct = gathered(inputs[:, order], difference[:, order], weights)[name]
    torch.testing.assert_close(taken, direct)


@pytest.mark.parametrize("name", NAMES)
def test_a_statistic_follows_a_rotation(name: str, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, difference, weights = samples
    rotation = torch.linalg.qr(torch.randn(IN, IN))[0]
    before = gathered(inputs, difference, torch.ones(TOKENS) if name == "mean_abs" else weights)
    after = carried(before, lambda x: x @ rotation.T, lambda w: w @ rotation.T)
    direct = gathered(
        inputs @ rotation.T, difference @ rotation.T, torch.ones(TOKENS) if name == "mean_abs" else weights
    )
    torch.testing.assert_close(after[name], direct[name], rtol=1e-4, atol=1e-4)
    if name in ("gram", "held_out_gram"):
        assert torch.equal(after[name], after[name].T)


def test_what_cannot_be_known_in_another_basis_is_left_out(samples: tuple[Tensor, Tensor, Tensor]) -> None:
    found = gathered(*samples)
    del found["inputs"]
    found["fisher"] = torch.ones(4, IN)
    after = carried(found, lambda x: x.flip(-1), lambda w: w.flip(-1))
    assert "mean_abs" not in after
    assert "fisher" not in after
    kept = carried(found, lambda x: x.flip(-1), lambda w: w.flip(-1), fisher=lambda f: f.flip(-1))
    assert torch.equal(kept["fisher"], found["fisher"].flip(-1))
