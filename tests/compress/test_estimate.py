"""What the estimate of time counts. The clock is one that goes a second forward whenever it is looked at, so that every
sample takes a second and the counts are seen."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress import estimate
from featherweight.tasks.compress.estimate import estimate_seconds, left_out
from featherweight.tasks.compress.plan import Plan, make_plan


@pytest.fixture
def plan_of(tiny: Any) -> Any:
    def made(recipe: str, *changes: str, **config: Any) -> Plan:
        with Checkpoint.open(tiny("llama", tokenizer=True, **config)) as checkpoint:
            return make_plan(checkpoint, load_recipe(recipe, changes), 1)

    return made


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))


def test_data_free_time_grows_with_the_weights(plan_of: Any, ticking: None) -> None:
    plan = plan_of("rtn-4", "grid.group_size=32")
    sample = 2 * estimate.MANY * 4 * estimate.WIDEST
    assert estimate_seconds(plan) == pytest.approx(plan.weights / sample)
    assert estimate_seconds(plan_of("ptqtp", "grid.group_size=32", "embedding=6bit")) > plan.weights / sample


def test_running_the_network_is_counted_by_tokens_and_streams(plan_of: Any, ticking: None) -> None:
    few = plan_of("gptq", "grid.group_size=32", "calibration.sequences=64", "calibration.length=32")
    many = plan_of("gptq", "grid.group_size=32", "calibration.sequences=128", "calibration.length=32")
    passes = [estimate._Passes(plan) for plan in (few, many)]
    assert passes[1].seconds == pytest.approx(2 * passes[0].seconds)
    two = plan_of("gptaq-4", "grid.group_size=32", "calibration.sequences=64", "calibration.length=32")
    tokens = 64 * 32
    assert estimate._Passes(two).seconds == pytest.approx(
        passes[0].seconds + tokens * passes[0].forward_token(torch.float32), rel=1e-9
    )
    assert estimate_seconds(many) > estimate_seconds(few)


def test_wider_layers_than_the_samples_are_extrapolated(
    plan_of: Any, ticking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("gptq", "grid.group_size=32")
    job = next(job for job in plan.jobs if job.layer.role == "q_proj")
    whole = estimate._Solving(plan, job)._with_data
    monkeypatch.setattr(estimate, "WIDEST", 32)  # half of the width
    narrow = estimate._Solving(plan, job)._with_data
    assert narrow == (8 * whole[0], 4 * whole[1], 4 * whole[2])


def test_what_wants_more_than_a_pass_gives_still_has_an_estimate(plan_of: Any) -> None:
    for preset in ("discquant", "quantlrm", "trit-2", "awq"):
        plan = plan_of(preset, "grid.group_size=32")
        assert 0 < estimate_seconds(plan) < 3600, preset
    assert left_out(plan_of("discquant", "grid.group_size=32")) == ["discquant"]
    assert left_out(plan_of("gptq", "grid.group_size=32")) == []


def test_tuning_the_whole_models_scales_is_counted(plan_of: Any, ticking: None) -> None:
    """Twelve steps of one window, three passes each; two windows held out, measured at the start and four times; the
    original once over those and the twelve others that are used."""
    settings = ("grid.group_size=32", "calibration.sequences=16", "calibration.length=32")
    tuned = "corrections=[{kind: scale-tuning, steps: 12, batch_size: 1, checks: 4, token_share: 0.5, precision: auto}]"
    plan = plan_of("trit-2", *settings, tuned)
    passes, tuning = estimate._Passes(plan), estimate._Tuning(plan)
    run, loss = passes.forward_token(torch.float32), estimate._head_token(plan, True)
    windows = 12 * (3 * run + loss / 2) + 5 * 2 * (run + loss / 2) + (12 + 2) * run
    assert tuning.seconds == pytest.approx(32 * windows + 12 * tuning._decoding)
    assert left_out(plan) == []
    assert estimate_seconds(plan) > estimate_seconds(plan_of("trit-2", *settings, "corrections=[]"))


def test_the_gradients_that_guide_statistics_are_counted(plan_of: Any, ticking: None) -> None:
    """Once forwards, once more and once back to the inputs, with the output layer's loss; statistics of every layer."""
    settings = ("grid.group_size=32", "calibration.sequences=16", "calibration.length=32")
    plain, plan = plan_of("gptq", *settings), plan_of("gptq", *settings, "calibration.guidance=1")
    run = estimate._Passes(plan).forward_token(estimate._Passes(plan)._dtype)
    assert estimate._Guiding(plain).seconds == 0
    assert estimate._Guiding(plan).seconds == pytest.approx(16 * 32 * (3 * run + estimate._head_token(plan, True)))
    assert estimate._Passes(plan)._statistics_token > estimate._Passes(plain)._statistics_token
    assert plan.calibration_bytes() > plain.calibration_bytes()
    assert plan.disk_bytes - plain.disk_bytes == 4 * 16 * 32 * len(plan.jobs)  # float32 a token and layer
