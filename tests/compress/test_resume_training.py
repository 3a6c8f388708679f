"""A training that was killed goes on where its state was saved, to the same bytes; a damaged state is ignored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import OutputError
from featherweight.storage.run import training_state as training_file
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.storage.run.store import Store
from featherweight.storage.run.training_state import TrainingFile
from featherweight.storage.run.training_store import TrainingState
from featherweight.tasks.compress.compression import compress
from outputs import Stop, assert_only_output, contents, die, in_process, log_events, stopping

CHANGES = ("calibration.sequences=16", "calibration.length=48", "grid.group_size=32")
TRAININGS: dict[str, dict[str, Any]] = {
    "scale-tuning": {
        "recipe": "rtn-3",
        "changes": (*CHANGES, "corrections=[{kind: scale-tuning, steps: 12, checks: 12, batch_size: 2, norms: true}]"),
    },
    "discquant": {"recipe": "discquant-fast", "changes": (*CHANGES, "rounding.steps=10", "rounding.batch_size=2")},
}
FILES = {"scale-tuning": "training-correction-0.safetensors", "discquant": "training-rounding.safetensors"}


def tune_and_die(model: str, out: str, kind: str, step: int | None) -> None:
    """Target of a process: compress with savings after each step, and die when the state of `step` is on disk."""
    training_file.SAVE_SECONDS, training_file.SHARE = 0.0, 0
    save = TrainingFile.save

    def save_and_die(self: TrainingFile, state: TrainingState) -> None:
        save(self, state)
        if state.step == step:
            die()

    TrainingFile.save = save_and_die  # type: ignore[method-assign]
    compress(model, out=out, threads=1, **TRAININGS[kind])


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The outputs of runs that nothing stopped and that saved nothing."""
    torch.set_num_threads(1)
    found = {}
    for kind, options in TRAININGS.items():
        out = tmp_path_factory.mktemp(kind) / "out"
        compress(llama, out=out, threads=1, **options)
        assert not any("goes on behind" in event.get("text", "") for event in log_events(out))
        found[kind] = contents(out)
    return found


def notes(out: Path) -> list[str]:
    return [event["text"] for event in log_events(out) if event["event"] == "note"]


@pytest.mark.parametrize("kind", TRAININGS)
def test_killed_while_training(llama: Path, whole: Any, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    assert in_process(tune_and_die, str(llama), str(out), kind, 3) == -9
    assert (tmp_path / ("out" + RUN_SUFFIX) / "artifacts" / FILES[kind]).exists()
    assert in_process(tune_and_die, str(llama), str(out), kind, 7) == -9
    assert in_process(tune_and_die, str(llama), str(out), kind, None) == 0
    said = [note for note in notes(out) if "goes on behind step" in note]
    assert said == [f"{kind} goes on behind step {step}, where it was saved" for step in (3, 7)]
    assert_only_output(out, whole[kind])


def damage_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def damage_header(path: Path) -> None:
    """A number among the facts, of the same length."""
    content = path.read_bytes()
    for key in (b'\\"step\\": 3', b'\\"step\\":3'):
        if key in content:
            path.write_bytes(content.replace(key, key[:-1] + b"5", 1))
            return
    raise AssertionError(json.dumps(content[:200].decode(errors="replace")))


@pytest.mark.parametrize("damage", [damage_truncated, damage_empty, damage_bit, damage_header])
def test_a_damaged_state_is_ignored(llama: Path, whole: Any, tmp_path: Path, damage: Any) -> None:
    kind, out = "scale-tuning", tmp_path / "out"
    assert in_process(tune_and_die, str(llama), str(out), kind, 3) == -9
    damage(tmp_path / ("out" + RUN_SUFFIX) / "artifacts" / FILES[kind])
    compress(llama, out=out, threads=1, **TRAININGS[kind])
    assert any("is damaged and ignored: it begins anew" in note for note in notes(out))
    assert_only_output(out, whole[kind])


def test_a_state_of_another_task_is_ignored(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    file = TrainingFile(Store(tmp_path), "state", told.append)
    state = TrainingState({"label": "one"}, 4, {"best": float("nan")}, {"value": torch.arange(3.0)})
    file.save(state)
    assert told == []
    found = file.load({"label": "one"})
    assert found is not None
    assert found.step == 4
    assert torch.equal(found.tensors["value"], torch.arange(3.0))
    assert file.load({"label": "two"}) is None
    assert "of another task" in told[-1]["text"]
    assert not file.path.exists()


def test_a_stop_within_the_first_training_leaves_its_state(
    llama: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer is finished by then, and the folder is kept all the same."""
    monkeypatch.setattr(training_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_file, "SHARE", 0)
    save, out = TrainingFile.save, tmp_path / "out"

    def save_and_stop(self: TrainingFile, state: TrainingState) -> None:
        save(self, state)
        if state.step == 6:
            raise Stop

    monkeypatch.setattr(TrainingFile, "save", save_and_stop)
    with pytest.raises(Stop):
        compress(llama, out=out, threads=1, **TRAININGS["discquant"])
    monkeypatch.setattr(TrainingFile, "save", save)
    compress(llama, out=out, threads=1, **TRAININGS["discquant"])
    assert any("goes on behind step 6" in note for note in notes(out))
    assert_only_output(out, whole["discquant"])


def test_a_full_disk_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    file = TrainingFile(Store(tmp_path), "state", told.append)
    state = TrainingState({"label": "one"}, 4, {}, {"value": torch.arange(3.0)})
    file.save(state)

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(Store, "keep", full)
    for _ in range(2):
        file.save(state)
    assert [event["text"] for event in told] == [
        "the state of the training cannot be saved (the disk is full); it goes on, but cannot be resumed"
    ]
    found = file.load({"label": "one"})
    assert found is not None
    assert found.step == 4


def test_savings_cost_at_most_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training_file.time, "monotonic", lambda: now[0])
    file = TrainingFile(Store(tmp_path), "state", lambda _: None)

    def slow(*_: Any, **__: Any) -> None:
        now[0] += 10

    monkeypatch.setattr(Store, "keep", slow)
    assert not file.due()
    now[0] = 60.0
    assert file.due()
    file.save(TrainingState({}, 1, {}, {}))
    now[0] += 199
    assert not file.due()
    now[0] += 1
    assert file.due()


@pytest.mark.parametrize("lost", ["a tuned layer", "the assembly"])
def test_what_was_tuned_and_then_lost_is_tuned_again(llama: Path, tmp_path: Path, lost: str) -> None:
    """Never does a layer as it was before stand among tuned ones; norms that are there count as no other step's."""
    options = {**TRAININGS["scale-tuning"], "threads": 1, "shard_bytes": 20_000}
    compress(llama, out=tmp_path / "whole" / "out", **options)
    out, run = tmp_path / "cut" / "out", tmp_path / "cut" / ("out" + RUN_SUFFIX)
    with pytest.raises(Stop):
        compress(llama, out=out, observer=stopping("shard", 3), **options)
    tuned = sorted((run / "artifacts").glob("tuned-*"))
    assert 0 < len(tuned) < 14
    if lost == "a tuned layer":
        damage_bit(tuned[-1])
    else:
        (run / "assembly.json").unlink()
    compress(llama, out=out, **options)
    assert_only_output(out, contents(tmp_path / "whole" / "out"))
