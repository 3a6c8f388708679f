"""The time left of a run: layers by the pace of the blocks, tunings as foretold until they have begun."""

from __future__ import annotations

from typing import Any

import pytest

from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress import forecast, journal
from featherweight.tasks.compress.estimate import tuning_seconds
from featherweight.tasks.compress.forecast import Forecast
from featherweight.tasks.compress.plan import Plan, make_plan

TUNED = ("grid.group_size=32", "corrections=[{kind: scale-tuning, steps: 3}]")


@pytest.fixture
def plan(tiny: Any) -> Plan:
    with Checkpoint.open(tiny("llama", tokenizer=True)) as checkpoint:
        return make_plan(checkpoint, load_recipe("gptq", TUNED), 1)


def test_tunings_are_counted_until_they_tell_themselves(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "tuning_seconds", lambda _: [("scale-tuning", 50.0), ("other-tuning", 7.0)])
    told: list[dict[str, Any]] = []
    watch = Forecast(plan, told.append)
    watch({"event": "layer", "seconds_left": 10.0})
    watch({"event": "layer", "seconds_left": None})
    watch({"event": "scale-tuning", "step": 1, "of": 3, "seconds_left": 20.0})
    watch({"event": "other-tuning", "step": 1, "of": 3, "seconds_left": 4.0})
    watch({"event": "gradients", "seconds_left": 3.0})
    assert [event.get("seconds_left") for event in told] == [67.0, None, 20.0, 4.0, 3.0]
    assert [event.get("run_seconds_left") for event in told] == [None, None, 27.0, 4.0, None]


def test_only_trainings_of_the_whole_model_are_foretold(plan: Plan, tiny: Any) -> None:
    ((kind, seconds),) = tuning_seconds(plan)
    assert kind == "scale-tuning"
    assert seconds > 0
    with Checkpoint.open(tiny("llama", tokenizer=True)) as checkpoint:
        assert tuning_seconds(make_plan(checkpoint, load_recipe("gptq", TUNED[:1]), 1)) == []


def test_what_comes_before_the_blocks_does_not_count_against_them(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take a second a thousand weights and 100 more where the network is run for their input."""
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    told: list[dict[str, Any]] = []
    kept = journal.Journal(plan, told.append)
    now[0] = 1000.0  # an embedding, gradients
    kept.begin_blocks()
    met: set[str] = set()
    costs = []
    for job in plan.jobs:
        costs.append(job.layer.parameters / 1000 + 100 * (job.layer.input_group not in met))
        met.add(job.layer.input_group)
    assert len(met) < len(plan.jobs)
    for number, (job, cost) in enumerate(zip(plan.jobs, costs, strict=True)):
        now[0] += cost
        kept.finish(number, {"name": job.layer.name}, False)
        left = told[-1]["seconds_left"]
        if number:
            assert left == pytest.approx(sum(costs[number + 1 :]))
        else:  # nobody knows yet what of it was the network's
            assert 0 < left < cost * len(plan.jobs) * 10


def test_layers_that_were_found_finished_say_nothing_of_the_pace(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    told: list[dict[str, Any]] = []
    kept = journal.Journal(plan, told.append)
    for number, job in enumerate(plan.jobs):
        now[0] += 0.001 if number < 7 else job.layer.parameters / 1000
        kept.finish(number, {"name": job.layer.name}, number < 7)
    assert all(event["seconds_left"] is None for event in told[:7])
    assert told[8]["seconds_left"] == pytest.approx(sum(job.layer.parameters for job in plan.jobs[9:]) / 1000)
