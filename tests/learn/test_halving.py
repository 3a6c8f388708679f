"""Trainings on a device whose memory does not hold a batch: its parts give the same gradients, and a word is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.methods.learn.objectives import BlockObjective, ModelObjective, all_or_no_gradients
from featherweight.tasks.compress.compression import compress
from known_memory import Memory
from models import make_tiny

TOLERANCE = 1e-5  # relative to the largest gradient of a matrix
WINDOWS, LENGTH = 10, 16


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Counts windows that run with gradients."""
    held = Memory()
    before: Callable[..., Any] = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            held.hold(len(hidden_states))
        return before(self, hidden_states, *args, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return held


@contextmanager
def opened(events: list[dict[str, Any]], held_out: float = 0.2, at_once: int | None = None) -> Iterator[Any]:
    settings = CalibrationSettings(batch_tokens=4 * LENGTH, held_out=held_out)
    needs = ("gram", "targets", *(("held_out_gram",) if held_out else ()))
    with n.opened(
        "llama", settings, needs, windows=n.ids(WINDOWS, LENGTH), notify=events.append, windows_a_pass=at_once
    ) as calibration:
        yield calibration


def learned(layers: BlockSession | WholeModel) -> dict[str, Tensor]:
    """Leaves near the weights of a block, or of the model."""
    names = [name for name in layers.layers if "lm_head" not in name]
    return {name: layers.weight(name).round(decimals=2).requires_grad_() for name in names}


def block_step(
    events: list[dict[str, Any]], held_out: float = 0.2, at_once: int | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of both batches of a block, the held-out loss, and the gradients of both together."""
    with opened(events, held_out, at_once) as calibration:
        session = next(iter(calibration.blocks()))
        objective, leaves = BlockObjective(session, 0.34), learned(session)
        assert objective.batches == 2
        losses = [objective.backward(leaves, {}, batch) for batch in (0, 1)]
        losses.append(objective.held_out_loss(leaves, {}))  # type: ignore[arg-type]
        return losses, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def model_step(events: list[dict[str, Any]], at_once: int | None = None) -> tuple[list[float], dict[str, Tensor]]:
    with opened(events, at_once=at_once) as calibration, calibration.whole_model() as whole:
        objective, leaves = ModelObjective(whole, 4), learned(whole)
        assert objective.batches == 2
        losses = [objective.backward(leaves, {}, batch) for batch in (0, 1)]
        losses.append(objective.held_out_loss(leaves, {}))  # type: ignore[arg-type]
        return losses, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


Step = Callable[..., tuple[list[float], dict[str, Tensor]]]


def same(found: tuple[list[float], dict[str, Tensor]], wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-7)  # divergences are differences of float32 logarithms
    assert found[1].keys() == wanted[1].keys()
    assert len(found[1]) in (7, 14)
    for name, gradient in found[1].items():
        assert n.close(gradient, wanted[1][name], TOLERANCE), name


@pytest.mark.parametrize(("limit", "words"), [(3, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("step", [block_step, model_step])
def test_a_step_is_the_same(step: Step, limit: int, words: int, memory: Memory) -> None:
    wanted = step([])
    memory.limit, events = limit, list[dict[str, Any]]()
    same(step(events), wanted)
    assert memory.failed
    said = [event["text"] for event in events if event["event"] == "note"]
    assert len(said) == words
    assert said[0].endswith(" 2 windows from here on")
    assert all(text.startswith("cpu ran out of memory: ") for text in said)


@pytest.mark.parametrize(
    ("step", "call"),
    [(block_step, 1), (block_step, 2), (block_step, 4), (model_step, 2), (model_step, 3), (model_step, 7)],
)
def test_at_any_moment(step: Step, call: int, memory: Memory) -> None:
    """What was added up of a step that failed in its second part does not count twice."""
    wanted = step([])
    memory.calls, memory.fails_at = 0, call
    same(step([], at_once=2), wanted)
    assert memory.failed


def test_held_out_batches_taken_from_the_others(memory: Memory) -> None:
    """They are whole batches of the settings, however many parts these have."""
    wanted = block_step([], held_out=0)
    memory.limit = 1
    same(block_step([], held_out=0), wanted)


def test_batches_that_are_split_beforehand() -> None:
    """As a plan does that knows the device's memory."""
    wanted = block_step([])
    settings = CalibrationSettings(batch_tokens=4 * LENGTH, held_out=0.2)
    needs = ("gram", "targets", "held_out_gram")
    with n.opened("llama", settings, needs, windows=n.ids(WINDOWS, LENGTH), windows_a_pass=3) as calibration:
        assert [len(batch["input_ids"]) for batch in calibration.batches] == [2, 2, 2, 2, 2]
        session = next(iter(calibration.blocks()))
        assert session.whole_batches == [[0, 1], [2, 3], [4]]
        objective, leaves = BlockObjective(session), learned(session)
        losses = [objective.backward(leaves, {}, batch) for batch in (0, 1)]
        losses.append(objective.held_out_loss(leaves, {}))  # type: ignore[arg-type]
    same((losses, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}), wanted)


@pytest.mark.parametrize(
    ("step", "what"), [(block_step, "one window of the calibration"), (model_step, "the whole model with one window")]
)
def test_one_window_is_the_least(step: Step, what: str, memory: Memory) -> None:
    memory.limit = 0
    with pytest.raises(CalibrationError, match=f"the memory of cpu does not suffice for .*{what}.*calibration.length"):
        step([])


def test_the_originals_states_are_given_back_first(memory: Memory) -> None:
    with opened([]) as calibration, calibration.whole_model() as whole:
        objective, leaves = ModelObjective(whole, 4), learned(whole)
        objective.backward(leaves, {}, 0)
        assert objective._teacher
        memory.calls, memory.fails_at = 0, 1
        objective.backward(leaves, {}, 1)
        assert memory.failed
        assert not objective._teacher
        assert objective._at_once == 4


def test_gradients_are_added_or_left() -> None:
    kept, new = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    kept.grad = torch.full((2,), 5.0)

    def failing() -> None:
        with all_or_no_gradients([kept, new]):
            (kept * new).sum().backward()
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        failing()
    assert kept.grad.tolist() == [5.0, 5.0]
    assert new.grad is None
    with all_or_no_gradients([kept, new]):
        (3 * kept * new).sum().backward()
    assert kept.grad.tolist() == [8.0, 8.0]
    assert new.grad.tolist() == [3.0, 3.0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        ("rounding={kind: flexround, steps: 3}",),
        ("rounding={kind: discquant, steps: 3, batch_size: 4}",),
        ("corrections=[{kind: scale-tuning, steps: 3, batch_size: 4, against: model}]",),
    ],
    ids=["flexround", "discquant", "scale-tuning"],
)
def test_whole_runs(changes: tuple[str, ...], memory: Memory, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * 7919 % 1000} green bottles hang on the wall. " for i in range(300)))
    changes += ("calibration={sequences: 8, length: 24, held_out: 0.25}", "grid.group_size=32")
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    wanted = compress(model, "rtn-3", tmp_path / "whole", changes=changes, calibration=text, threads=1)
    memory.limit, events = 1, list[dict[str, Any]]()
    found = compress(
        model, "rtn-3", tmp_path / "parts", changes=changes, calibration=text, threads=1, observer=events.append
    )
    assert any("ran out of memory" in event.get("text", "") for event in events)
    for one, other in zip(found.layers, wanted.layers, strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=1e-2)
