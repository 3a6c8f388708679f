"""PT2-LLM's order of the columns: the most similar ones that remain share a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep_problems import Problem, grid, missed, problem, run, same

from featherweight.methods.quantize.grids.offset_trits import OffsetTritGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.sweep import SweepSettings, sweep
from featherweight.storage.codes.permuted import Permuted


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("group_size", [5, 16, 24, 130])
@pytest.mark.parametrize("how", [{}, {"shrink": 0.2}, {"alpha": 0.5, "target": "shift"}], ids=str)
def test_the_order_by_similarity_is_that_of_a_plain_sweep(group_size: int, how: dict[str, Any]) -> None:
    """Put into the order found, the columns are swept to the same code: the factor's rows are the right ones."""
    given = problem(n=140)
    found = run(given, grid(group_size=group_size), order="similarity", **how)
    assert isinstance(found.code, Permuted)
    order = found.code.order.long()
    moved = Problem(given.weight[:, order], given.inputs[order], given.original_inputs[order])
    plain = run(moved, grid(group_size=group_size), **how)
    assert torch.equal(plain.code.decode(), found.code.inner.decode())
    assert found.loss == pytest.approx(plain.loss, rel=1e-9)
    if not how:
        assert found.loss == pytest.approx(missed(given.weight, found.code, given.damped()), rel=1e-9)


def test_every_group_is_the_most_similar_of_the_columns_that_remain() -> None:
    """A transcription of eq. 16 over compensated columns, each the best answer to those that are rounded."""
    given, size = problem(n=40), 8
    code = run(given, grid(group_size=size), order="similarity").code
    assert isinstance(code, Permuted)
    order, h = code.order.long(), given.damped()
    error = code.decode().double() - given.weight
    alone: list[int] = []
    for first in range(0, 40, size):
        done, left = order[:first], order[first:].sort().values
        now = given.weight[:, left] - error[:, done] @ h[done][:, left] @ torch.linalg.inv(h[left][:, left])
        cosines = torch.nn.functional.cosine_similarity(now, now.mean(1, keepdim=True), dim=0)
        assert order[first : first + size].tolist() == left[cosines.topk(size).indices].sort().values.tolist()
        fresh = given.weight[:, left]
        before = torch.nn.functional.cosine_similarity(fresh, fresh.mean(1, keepdim=True), dim=0)
        alone += left[before.topk(size).indices].sort().values.tolist()
    assert alone != order.tolist()  # compensation does change the choice


def test_similar_columns_share_groups_of_less_error() -> None:
    """PT2-LLM test 6, inside the sweep: columns shuffled from few prototypes, each with its own offset."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.randn(48, 4, generator=g, dtype=torch.float64) + torch.tensor([4.0, -4.0, 1.0, 0.0])
    weight = prototypes.repeat(1, 24) + 0.1 * torch.randn(48, 96, generator=g, dtype=torch.float64)
    weight = weight[:, torch.randperm(96, generator=g)]
    given = Problem(weight, problem(n=96).inputs, problem(n=96).inputs)
    trits = OffsetTritGrid(group_size=24)
    found, plain = (run(given, trits, order=order) for order in ("similarity", "none"))
    assert found.loss < 0.5 * plain.loss


def test_the_order_by_similarity_keeps_to_pieces_and_leaves_the_weight_alone() -> None:
    given = problem(rows=8, n=300, samples=600)
    weight, gram = given.weight.float(), given.statistics["gram"].float()
    before = weight.clone()
    how = SweepSettings(order="similarity", factor_columns=128)
    result = sweep(weight, {"gram": gram}, grid(group_size=32), how)
    assert torch.equal(weight, before)
    assert isinstance(result.code, Permuted)
    order = result.code.order.long()
    assert all(sorted(order[a:b].tolist()) == list(range(a, b)) for a, b in ((0, 128), (128, 256), (256, 300)))
    assert "cut into 3" in result.note
    assert Hessian(order="similarity").extra_bytes((8, 300)) == result.code.tensors()["order"].nbytes


def test_a_single_group_needs_no_order() -> None:
    given = problem()
    assert same(run(given, grid(group_size=64), order="similarity"), run(given, grid(group_size=64)))


@pytest.mark.parametrize("changes", [{"groups": "static"}, {"alpha": 0.25}])
def test_what_the_order_by_similarity_does_not_go_with(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="order similarity"):
        SweepSettings(order="similarity", **changes)
