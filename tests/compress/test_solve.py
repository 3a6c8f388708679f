"""One layer through the axes: what corrections split off counts, and is nested with what others do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, restricted
from featherweight.methods.quantize.base import Correction, HeldWeight, SolveOptions
from featherweight.methods.quantize.corrections.low_rank import LowRankCorrection
from featherweight.methods.quantize.corrections.outliers import DenseAndSparse
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.transforms.hadamard import HadamardTransform
from featherweight.methods.recipe import Recipe
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.tasks.compress.plan import Job
from featherweight.tasks.compress.solve import InputStatistics, solve_layer


class FirstColumns(Correction):
    """Keeps the first `count` columns apart, in a term of its own."""

    kind = "first-columns"
    count: int = 2

    def split(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Code | None]:
        kept, rest = torch.zeros_like(weight), weight.clone()
        kept[:, : self.count] = weight[:, : self.count]
        rest[:, : self.count] = 0
        return rest, Dense(kept)


class Watching(FirstColumns):
    """Also says what it was given to correct."""

    kind = "watching"

    def correct(self, weight: Tensor, code: Code, statistics: Statistics) -> Code:
        assert torch.equal(code.decode()[:, : self.count], weight[:, : self.count])
        return code


def weight() -> Tensor:
    found = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    found[:, 0] *= 1000  # a grid of two bits that sees this column serves no other
    return found


def solved(corrections: Sequence[Correction], transforms: Sequence[Any] = ()) -> Tensor:
    layer = LinearLayer(
        name="q_proj", tensor="q_proj.weight", shape=(16, 64), transposed=False, expert=None, fused_slice=False,
        block=0, role="q_proj", kind="attention", input_group="x", norm=None, bias=None, fused=(),
    )  # fmt: skip
    grid = UniformGrid(bits=2, group_size=64)
    recipe = Recipe(name="test", grid=grid, corrections=tuple(corrections), transforms=tuple(transforms))
    job = Job(layer, recipe.treatment)
    found = solve_layer(job, HeldWeight(weight()), InputStatistics({}, 0), SolveOptions(threads=1))
    return found.code.decode()


@pytest.mark.parametrize("correction", [FirstColumns(), Watching()], ids=lambda c: c.kind)
def test_the_term_that_a_split_gives_is_stored(correction: Correction) -> None:
    decoded = solved([correction])
    assert torch.equal(decoded[:, :2], weight()[:, :2])
    rest = weight()[:, 2:]
    assert float((decoded[:, 2:] - rest).norm() / rest.norm()) < 0.6  # 2 bits


def test_it_is_stored_in_the_basis_of_transforms() -> None:
    transform = HadamardTransform(block=64)
    turned = transform.for_layer(weight(), {}, 0).apply(weight())
    decoded = transform.for_layer(weight(), {}, 0).apply(solved([FirstColumns()], [transform]))
    assert torch.allclose(decoded[:, :2], turned[:, :2], atol=1e-2)


OUTLIERS = DenseAndSparse(sensitive=0, outliers=0.05, value_dtype="float32")


@pytest.mark.parametrize(
    "corrections",
    [
        [FirstColumns(), OUTLIERS],
        [OUTLIERS, FirstColumns()],
        [OUTLIERS, DenseAndSparse(sensitive=0, outliers=0.1, value_dtype="float32")],
        [FirstColumns(count=1), FirstColumns(count=3)],
        [FirstColumns(), LowRankCorrection(rank=2)],
    ],
    ids=lambda corrections: "+".join(c.kind for c in corrections),
)
def test_corrections_after_one_another_lose_nothing(corrections: list[Correction]) -> None:
    """What one takes away from the grid must come back although the other looks at another rest."""
    missed = (solved(corrections) - weight()).norm(dim=0)
    alone = (solved(corrections[:1]) - weight()).norm(dim=0)
    assert float(missed[0]) < 1  # of 4000
    assert float(missed.square().sum()) <= 1.05 * float(alone.square().sum())


def test_a_statistic_of_unknown_axes_is_refused_by_name() -> None:
    known = {"gram": torch.eye(8), "mean": torch.zeros(8), "inputs": torch.zeros(3, 8), "tokens": torch.tensor(3)}
    cut = restricted(known, 2, 5)
    assert {name: tuple(value.shape) for name, value in cut.items()} == {
        "gram": (3, 3), "mean": (3,), "inputs": (3, 3), "tokens": (),
    }  # fmt: skip
    with pytest.raises(ValueError, match="'variance'.*known are base, cross"):
        restricted({"variance": torch.ones(8)}, 2, 5)
