"""A device whose memory does not hold a batch: it is halved, everywhere, and the statistics stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.tasks.compress.compression import compress
from known_memory import Memory
from models import make_tiny

NEEDS = ("gram", "mean_abs", "cross", "held_out_gram", "targets")
WINDOWS = 7


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    held = Memory()
    before: Callable[..., Any] = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        held.hold(len(hidden_states))
        return before(self, hidden_states, *args, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return held


def walked(events: list[dict[str, Any]], token_weights: str = "none") -> list[dict[str, Tensor]]:
    """Statistics of all layers of both blocks, with weights that change on the way, so that there are two streams."""
    settings = CalibrationSettings(batch_tokens=4 * 16, held_out=0.3, token_weights=token_weights)
    found = []
    with n.opened("llama", settings, NEEDS, windows=n.ids(WINDOWS), notify=events.append) as calibration:
        for session in calibration.blocks():
            assert session.targets
            for stage in session.stages:
                found += list(session.gather(stage, NEEDS[:-1]).values())
                for name in stage:
                    session.set_weight(name, session.weight(name).round(decimals=1))
            assert sum(map(len, session.inputs)) == 5
            assert sum(map(len, session.held_out_inputs)) == 2
            assert [len(target) for target in session.targets] == [len(hidden) for hidden in session.inputs]
    return found


@pytest.mark.parametrize("limit", [3, 2, 1])
@pytest.mark.parametrize("token_weights", ["none", "attention"])
def test_statistics_are_the_same(limit: int, token_weights: str, memory: Memory) -> None:
    expected = walked([], token_weights)
    memory.limit = limit
    events: list[dict[str, Any]] = []
    found = walked(events, token_weights)
    said = [event["text"] for event in events if event["event"] == "note"]
    assert said[0] == "cpu ran out of memory: batches are of 2 windows from here on"
    assert len(said) == (1 if limit > 1 else 2)
    assert max(memory.held[-10:]) <= limit
    _same(found, expected)


@pytest.mark.parametrize("call", range(1, 46, 5))
def test_at_any_moment(call: int, memory: Memory) -> None:
    expected = walked([])
    memory.calls, memory.fails_at = 0, call
    events: list[dict[str, Any]] = []
    found = walked(events)
    assert memory.failed
    assert any(event["event"] == "note" for event in events)
    _same(found, expected)


def test_one_window_is_the_least(memory: Memory) -> None:
    memory.limit = 0
    with pytest.raises(CalibrationError, match="the memory of cpu does not suffice for one window of the calibration"):
        walked([])


def test_batches_of_any_module_stay_whole(memory: Memory) -> None:
    model, batches = n.whole("llama"), [n.ids(2)]
    calibration = Calibration.of_module(model, lambda module, ids: module(input_ids=ids), batches)
    memory.limit = 1
    with calibration, pytest.raises(CalibrationError, match="does not suffice for a batch"):
        list(calibration.blocks())


@pytest.mark.parametrize("preset", ["gptaq", "flexround-3", "d2quant"])
def test_a_whole_run(preset: str, memory: Memory, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * 7919 % 1000} green bottles hang on the wall. " for i in range(300)))
    changes = ("calibration.sequences=8", "calibration.length=24", "calibration.held_out=0.25", "grid.group_size=32")
    changes += ("rounding.steps=3",) if preset.startswith("flexround") else ()
    memory.limit, events = 3, list[dict[str, Any]]()
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    result = compress(model, preset, tmp_path / "out", changes=changes, calibration=text, observer=events.append)
    assert any("ran out of memory" in event.get("text", "") for event in events)
    assert len(result.layers) == 14


def _same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected) == 14
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert int(one["tokens"]) == int(other["tokens"])
        for name, value in one.items():
            scale = float(other[name].abs().max()) or 1.0
            assert torch.allclose(value / scale, other[name] / scale, atol=1e-5), name
