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
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    told: list[dict[str, Any]] = []
    kept = journal.Journal(plan, told.append)
    now[0] = 1000.0  # an embedding, gradients
    kept.begin_blocks()
    now[0] = 1010.0
    kept.finish(0, {"name": plan.jobs[0].layer.name}, False)
    done = plan.jobs[0].layer.parameters
    assert told[-1]["seconds_left"] == pytest.approx(10.0 * (plan.weights - done) / done)
