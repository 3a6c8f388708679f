"""Methods have no state of their own: runs side by side in one process do not touch each other."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sweep_problems import problem

from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding import hessian
from featherweight.methods.quantize.rounding.hessian import Hessian


@pytest.mark.parametrize("shared", [False, True], ids=["own options", "shared options"])
def test_two_sweeps_at_the_very_same_time(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have begun to remember their second moment before either goes on, one after the other."""
    rounding, on = Hessian(), UniformGrid(bits=3, group_size=16)
    tasks = [problem(seed, rows=8) for seed in range(2)]
    moments = [{"gram": given.statistics["gram"].float()} for given in tasks]
    weights = [given.weight.float() for given in tasks]
    expected = [
        rounding.quantize_source(HeldWeight(weight), on, known, SolveOptions()).decode()
        for weight, known in zip(weights, moments, strict=True)
    ]
    meet = threading.Barrier(2)

    def ref(*arguments: Any) -> Any:
        meet.wait(30)
        if threading.current_thread() is threads[1]:
            threads[0].join(60)  # then finds what the other has left
        return weakref.ref(*arguments)

    options = [SolveOptions()] * 2 if shared else [SolveOptions() for _ in range(2)]
    warm_up = problem(7, rows=8)
    rounding.quantize_source(HeldWeight(warm_up.weight.float()), on, warm_up.statistics, options[0])
    monkeypatch.setattr(hessian, "weakref", SimpleNamespace(ref=ref))
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        source = HeldWeight(weights[number])
        found[number] = rounding.quantize_source(source, on, moments[number], options[number]).decode()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_run_s_layers_share_a_factor_as_long_as_its_moment_lives() -> None:
    rounding, on, options = Hessian(), UniformGrid(bits=3, group_size=16), SolveOptions()
    given = problem(rows=8)
    moments = {"gram": given.statistics["gram"].float()}
    weight = given.weight.float()
    rounding.quantize_source(HeldWeight(weight), on, moments, options)
    kept = options.memo.latest
    assert kept is not None
    rounding.quantize_source(HeldWeight(weight), on, moments, options)
    assert options.memo.latest is kept
    moments["gram"] += torch.eye(len(moments["gram"]))
    changed = rounding.quantize_source(HeldWeight(weight), on, moments, options)
    assert options.memo.latest is not kept
    fresh = rounding.quantize_source(HeldWeight(weight), on, moments, SolveOptions())
    assert torch.equal(changed.decode(), fresh.decode())
    del moments
    assert options.memo.latest is None
    assert options == SolveOptions()
