"""What passes are made in: as asked, or whichever is faster here; the choice is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featherweight.errors import FeatherError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import load_recipe
from featherweight.system import precision
from featherweight.system.precision import bfloat16_time_ratio, choose_precision
from featherweight.tasks.compress.data import pass_precision


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.4, "bfloat16"), (0.79, "bfloat16"), (0.81, "float32"), (22.0, "float32")]
)
def test_auto_takes_the_faster_type_and_says_so(monkeypatch: pytest.MonkeyPatch, ratio: float, chosen: str) -> None:
    monkeypatch.delenv("FEATHERWEIGHT_PRECISION")
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda *_: ratio)
    events: list[dict[str, Any]] = []
    assert choose_precision("auto", events.append) == chosen
    assert [event["chosen"] for event in events] == [chosen]
    assert chosen in events[0]["text"]
    assert CalibrationSettings().torch_dtype() == getattr(torch, chosen)


def test_what_is_asked_for_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda *_: pytest.fail("timed"))
    events: list[dict[str, Any]] = []
    assert choose_precision("bfloat16", events.append) == "bfloat16"
    assert choose_precision("float32", events.append) == "float32"
    assert not events


@pytest.mark.parametrize("value", ["bfloat16", "float32", " BFloat16 "])
def test_the_environment_decides_instead(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda *_: pytest.fail("timed"))
    monkeypatch.setenv("FEATHERWEIGHT_PRECISION", value)
    events: list[dict[str, Any]] = []
    assert choose_precision("auto", events.append) == value.strip().lower()
    assert "FEATHERWEIGHT_PRECISION" in events[0]["text"]
    assert choose_precision("float32") == "float32"  # what a recipe fixes stays


def test_the_environment_names_no_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_PRECISION", "int8")
    with pytest.raises(FeatherError, match="FEATHERWEIGHT_PRECISION is 'int8', expected float32, bfloat16 or auto"):
        choose_precision("auto")


def test_both_types_are_timed_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16_time_ratio.cache_clear()
    state = torch.get_rng_state()
    with torch.inference_mode():  # gradients are timed whatever the caller's mode
        first = bfloat16_time_ratio()
    assert 0 < first < float("inf")
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("timed again"))
    assert bfloat16_time_ratio() == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["trit-2", "trit-1", "flexround", "flexround-3", "discquant", "discquant-4"])
def test_presets_that_train_leave_the_type_to_the_machine(name: str) -> None:
    recipe = load_recipe(name)
    chosen = [getattr(choice, "precision", None) for choice in (recipe.rounding, *recipe.corrections)]
    assert "auto" in chosen


@pytest.mark.parametrize(
    ("preset", "chosen"),
    [("gptq", "bfloat16"), ("trit-2-blockwise", "bfloat16"), ("trit-2", "float32"), ("awq", "float32")],
)
def test_what_trains_or_compares_blocks_keeps_exact_values(
    monkeypatch: pytest.MonkeyPatch, preset: str, chosen: str
) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_PRECISION", "bfloat16")
    assert pass_precision(load_recipe(preset)) == chosen
    assert pass_precision(load_recipe(preset, ("calibration.dtype=bfloat16",))) == "bfloat16"
