"""Second moments of bfloat16 inputs against float64; statistics by this route against the other one."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from featherweight.methods.calibrate.accumulate import Accumulator
from featherweight.methods.calibrate.statistics import moments as statistics
from featherweight.native import library
from featherweight.native.moments import WITH_PAIRS, PairMoment, _Job, available

SHAPES = [(1, 1, 1), (2, 16, 32), (33, 17, 50), (1024, 64, 96), (1025, 31, 33), (2100, 400, 10)]
needed = pytest.mark.skipif(not available(), reason="this processor does not multiply pairs of bfloat16")


@pytest.fixture(params=WITH_PAIRS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Each instruction set that has the kernel here."""
    native = library.get()
    assert native is not None
    before = native.isa, native.product_isa
    try:
        native.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    native.restore_isa(*before)


@needed
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_sum_of_products(isa: str, tokens: int, rows: int, columns: int, threads: int) -> None:
    left, right = torch.randn(tokens, rows + 5).bfloat16()[:, 2 : rows + 2], torch.randn(tokens, columns).bfloat16()
    sums = torch.full((rows, columns), float("nan"))
    moment = PairMoment(sums, threads=threads)
    moment.add(left, right, 0.0, 0.25)  # what was there does not count
    moment.add(left, right, 0.5, 2.0)
    wanted = (0.125 + 2.0) * left.double().T @ right.double()
    size = left.double().abs().T @ right.double().abs()
    assert bool(((sums - wanted).abs() <= 1e-6 * 2.125 * size).all())


@needed
@pytest.mark.parametrize("columns", [1, 32, 33, 100, 500])
def test_above_the_diagonal(isa: str, columns: int) -> None:
    inputs = torch.randn(300, columns).bfloat16()
    whole, above = torch.zeros(columns, columns), torch.zeros(columns, columns)
    PairMoment(whole).add(inputs, inputs, 0.0, 1.0)
    PairMoment(above, above=True).add(inputs, inputs, 0.0, 1.0)
    assert torch.equal(above.triu(), whole.triu())
    assert torch.equal(whole, whole.T)


@needed
@pytest.mark.parametrize("guided", [0, 1, 3])
def test_statistics_are_those_of_float32_inputs(isa: str, monkeypatch: pytest.MonkeyPatch, guided: int) -> None:
    """Means over batches of odd sizes; the cross moment's differences, and inputs times the roots of weights, are
    rounded to bfloat16."""
    needs = ("gram", "held_out_gram", "cross", "inputs", "mean")
    batches = [(torch.randn(n, 70).bfloat16(), 0.1 * torch.randn(n, 70)) for n in (130, 64, 1)]

    def gather() -> dict[str, torch.Tensor]:
        accumulator = Accumulator(70, needs, torch.device("cpu"), guided)
        for inputs, difference in batches:
            weights = torch.linspace(0.1, 3, guided * len(inputs)).view(guided, -1) if guided else None
            accumulator.add(inputs, weights, difference)
            accumulator.add_held_out(inputs, weights)
        return accumulator.finish()

    found = gather()
    monkeypatch.setattr(statistics, "pairs_available", lambda: False)
    wanted = gather()
    assert found.keys() == wanted.keys()
    for name in found:
        one, other = found[name].float(), wanted[name].float()
        tolerance = 4e-3 if name == "cross" else 3e-3 if guided else 1e-6
        assert float((one - other).norm()) <= tolerance * float(other.norm())
    assert torch.equal(found["gram"], found["gram"].T)
    assert ("gram_of_rows" in found) == (guided > 1)


@needed
def test_shapes_that_do_not_fit() -> None:
    moment = PairMoment(torch.zeros(4, 6))
    for left, right in (((3, 4), (2, 6)), ((3, 5), (3, 6)), ((3, 4), (3, 7))):
        with pytest.raises(ValueError, match="do not fit"):
            moment.add(torch.zeros(left).bfloat16(), torch.zeros(right).bfloat16(), 1.0, 1.0)


def test_the_border_refuses_what_it_cannot_know() -> None:
    """Every field that is wrong alone; without the instructions, every call."""
    native = library.job_function("fw_moment")
    assert native is not None
    values, sums = torch.zeros(8, 40).bfloat16(), torch.zeros(40, 40)
    work = torch.empty(1 << 20, dtype=torch.uint8)
    good = {
        **{"left": values.data_ptr(), "right": values.data_ptr(), "sums": sums.data_ptr(), "work": work.data_ptr()},
        **{"tokens": 8, "rows": 40, "columns": 40, "left_stride": 40, "right_stride": 40, "sums_stride": 40},
        **{"work_bytes": len(work), "kept": 1.0, "added": 1.0, "above": 0},
    }

    def call(**changes: Any) -> int:
        job = _Job(**good | changes)
        return native(ctypes.addressof(job), 2)

    assert call() == (library.OK if available() else library.INVALID)
    wrong: dict[str, Any] = {"left": 0, "right": 0, "sums": 0, "work": 0, "tokens": -1, "rows": 0, "columns": 1 << 60}
    wrong |= {"left_stride": 39, "right_stride": 1, "sums_stride": 39, "work_bytes": 1000}
    for name, value in wrong.items():
        assert call(**{name: value}) == library.INVALID, name
    assert native(0, 2) == library.INVALID
