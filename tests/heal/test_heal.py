"""`heal`: nearer to the original in the same bytes, never worse, the same after any stop, nothing lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight.errors import CheckpointError, FeatherError, OutputError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.heal.result import Healing
from featherweight.tasks.heal.settings import HealSettings
from featherweight.tasks.heal.window import starts
from models import make_tiny

LONG = pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")
QUICK = HealSettings(steps=12, batch=4, length=32, windows=64, held_out=8, score=256, learning_rate=0.02)
RECIPE = {"name": "planes", "grid": {"kind": "trit-planes", "planes": 1, "group_size": 32}, "embedding": "4bit"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("heal") / "model", tokenizer=True, initializer_range=0.2)


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    return featherweight.compress(model, RECIPE, model.with_name("small")).out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, path = random.Random(0), tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(draw.choice(["once", "upon", "a", "time", "there", "was", "rain"]) for _ in range(4000)))
    return path


@pytest.fixture(scope="module")
def heal(model: Path, small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Healing]:
    place = tmp_path_factory.mktemp("healed")

    def run(out: str, settings: HealSettings = QUICK, **options: Any) -> Healing:
        return featherweight.heal(
            options.pop("small", small), options.pop("against", model), place / out, settings=settings,
            text=text, score_text=text, threads=1, **options,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def healed(heal: Callable[..., Healing]) -> Healing:
    return heal("healed")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "featherweight-run.json"}


def test_the_result_is_nearer_to_the_original(healed: Healing, small: Path) -> None:
    assert healed.before is not None
    assert healed.after is not None
    assert healed.after.kl is not None
    assert healed.before.kl is not None
    assert healed.after.kl < 0.8 * healed.before.kl
    assert healed.loss_after[0] < 0.8 * healed.loss_before[0]
    assert healed.kept
    assert 0 < healed.moved < 0.5
    assert healed.bytes == sum(path.stat().st_size for path in small.glob("*.safetensors"))


def test_the_result_is_an_output_like_any(healed: Healing, small: Path, model: Path) -> None:
    """Same codes with other digits, whole by its hashes, its errors against the original, in the card, too."""
    assert verify(healed.out).whole
    assert (healed.out / "config.json").read_bytes() == (small / "config.json").read_bytes()
    with Checkpoint.open(healed.out) as after, Checkpoint.open(small) as before:
        assert {n: (after.entry(n).shape, after.entry(n).dtype) for n in after.names} == {
            n: (before.entry(n).shape, before.entry(n).dtype) for n in before.names
        }
        name = "model.layers.0.mlp.down_proj"
        code = load_code(after, name)
        with Checkpoint.open(model) as original:
            weight = original.tensor(f"{name}.weight").float()
    manifest = json.loads((healed.out / "featherweight.json").read_text())
    record = next(record for record in manifest["layers"] if record["name"] == name)
    assert record["relative_error"] == pytest.approx(float((code.decode() - weight).norm() / weight.norm()), rel=1e-4)
    assert manifest["healed"][0]["steps"] == 12
    assert "| healed | 12 steps against the original |" in (healed.out / "README.md").read_text()


def test_the_embedding_stays_and_norms_move(healed: Healing, small: Path) -> None:
    with Checkpoint.open(healed.out) as after, Checkpoint.open(small) as before:
        for name in before.names:
            same = torch.equal(after.tensor(name), before.tensor(name))
            assert same == ("embed_tokens" in name or name == "lm_head.weight"), name


def test_the_same_command_finds_its_output(heal: Callable[..., Healing], healed: Healing) -> None:
    files = files_of(healed.out)
    again = heal("healed")
    assert (again.steps, again.loss_after) == (healed.steps, healed.loss_after)
    assert files_of(healed.out) == files


def test_equal_runs_give_equal_bytes(heal: Callable[..., Healing], healed: Healing) -> None:
    assert files_of(heal("again").out) == files_of(healed.out)


@pytest.mark.parametrize(
    "settings",
    [
        replace(QUICK, level="blocks", steps=6),
        replace(QUICK, level="blocks", window=2, steps=6),
        replace(QUICK, level="scales"),
        replace(QUICK, loss="mixed"),
        replace(QUICK, loss="states"),
    ],
    ids=["blocks", "window of 2", "scales", "mixed", "states"],
)
def test_levels_and_losses(heal: Callable[..., Healing], settings: HealSettings, small: Path) -> None:
    result = heal(f"{settings.level}-{settings.window}-{settings.loss}", settings)
    assert all(after <= before for before, after in zip(result.loss_before, result.loss_after, strict=True))
    assert result.kept
    assert (result.moved == 0) == (settings.level == "scales")
    assert result.before is not None
    assert result.after is not None
    assert result.after.kl < result.before.kl  # type: ignore[operator]
    assert result.peak_memory_bytes <= 1.1 * result.planned_memory_bytes


@pytest.mark.parametrize("level", ["blocks", "model"])
def test_cat_q(heal: Callable[..., Healing], small: Path, level: Any) -> None:
    """A window of both blocks, and the whole model: nearer to the original; norms stay, and what is not one plane."""
    quick = replace(QUICK, training="cat-q", level=level, window=2 if level == "blocks" else 1)
    result = heal(f"cat-q-{level}", quick)
    assert result.kept
    assert result.moved > 0
    assert all(after < before for before, after in zip(result.loss_before, result.loss_after, strict=True))
    with Checkpoint.open(result.out) as after, Checkpoint.open(small) as before:
        same = {name for name in before.names if torch.equal(after.tensor(name), before.tensor(name))}
        assert {name for name in before.names if len(before.entry(name).shape) == 1} <= same
        assert not any(name.endswith("q_proj.trits") for name in same)
    assert verify(result.out).whole


def test_cat_q_is_for_one_plane(heal: Callable[..., Healing], model: Path, tmp_path: Path) -> None:
    two = {**RECIPE, "grid": {"kind": "trit-planes", "planes": 2, "group_size": 32}}
    other = featherweight.compress(model, two, tmp_path / "two").out
    with pytest.raises(FeatherError, match="is 2 trit-planes g32, and the training cat-q is for models of one"):
        heal("two", replace(QUICK, training="cat-q"), small=other)


def test_minutes_become_steps(heal: Callable[..., Healing]) -> None:
    result = heal("minutes", replace(QUICK, steps=None, minutes=0.05, score=0))
    assert result.steps >= 8
    assert result.before is None


@pytest.mark.parametrize("preset", ["rtn-4", "pt2-llm", "quartets", "ptqtp", "low rank beside"])
def test_any_code_is_healed(model: Path, text: Path, tmp_path: Path, preset: str) -> None:
    """Uniform codes, offsets, quartets, two planes; and one with low rank beside it."""
    recipe: Any = preset
    changes = ["calibration.sequences=8", "calibration.length=32"] if preset == "pt2-llm" else []
    if preset == "low rank beside":
        recipe = {**RECIPE, "name": "beside", "corrections": [{"kind": "lorc", "rank": 4}]}
    elif preset == "quartets":
        recipe = {"name": "quartets", "grid": {"kind": "sherry", "group_size": 64}}
    made = featherweight.compress(
        model, recipe, tmp_path / "small", changes=changes, calibration=text if changes else None
    )
    settings = replace(QUICK, steps=8, score=0, learning_rate=0.01)
    result = featherweight.heal(made.out, model, tmp_path / "healed", settings=settings, text=text, threads=1)
    assert result.loss_after[0] < result.loss_before[0]
    assert verify(result.out).whole


def test_nothing_better_leaves_what_was_given(heal: Callable[..., Healing], small: Path) -> None:
    result = heal("wild", replace(QUICK, learning_rate=30.0, steps=1, score=0))
    assert not result.kept
    assert result.moved == 0
    with Checkpoint.open(result.out) as after, Checkpoint.open(small) as before:
        assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in before.names)


def test_refusals(heal: Callable[..., Healing], model: Path, small: Path, tmp_path: Path) -> None:
    """One sentence each; and nothing is left behind."""
    other = make_tiny("llama", tmp_path / "other", tokenizer=True, hidden_size=32, head_dim=8)
    deeper = make_tiny("llama", tmp_path / "deeper", tokenizer=True, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="is not compressed, so there is nothing to heal"):
        heal("no", small=model)
    with pytest.raises(CheckpointError, match=r"is \[256, 64\] in .* and \[256, 32\] in .*: the two are different"):
        heal("no", against=other)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\..* it was made from another model"):
        heal("no", against=deeper)
    for settings, said in (
        (HealSettings(), "either a number of minutes or a number of steps"),
        (HealSettings(steps=1, minutes=1), "either a number of minutes or a number of steps"),
        (HealSettings(minutes=0), "minutes is 0, expected a number above 0"),
        (replace(QUICK, level="layers"), "there is no level 'layers' of healing"),  # type: ignore[arg-type]
        (replace(QUICK, window=2), "a window of 2 blocks is for the level blocks"),
        (replace(QUICK, level="blocks", loss="states"), "the loss is not to be chosen there"),
        (replace(QUICK, training="latent"), "there is no training 'latent' of healing"),  # type: ignore[arg-type]
        (replace(QUICK, training="cat-q", level="scales"), "cat-q chooses digits anew"),
        (replace(QUICK, learning_rate=0.0), "learning_rate is 0, expected a number above 0"),
    ):
        with pytest.raises(FeatherError, match=said):
            heal("no", settings)
    with pytest.raises(OutputError, match="lies in the folder of the model that is read"):
        featherweight.heal(small, model, small / "in", settings=QUICK)
    with pytest.raises(OutputError, match="exists already and is the output of another command"):
        featherweight.heal(small, model, shutil.copytree(small, tmp_path / "there"), settings=QUICK)


def test_too_little_memory_is_said_before(heal: Callable[..., Healing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.tasks.heal.memory.available_bytes", lambda: 1 << 20)
    with pytest.raises(FeatherError, match=r"needs about .* and 1\.05 MB are free: try --level blocks"):
        heal("no-room")


def test_windows_overlap_by_half() -> None:
    assert starts(4, 1) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert starts(6, 4) == [(0, 3), (2, 5)]
    assert starts(5, 2) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert starts(2, 8) == [(0, 1)]


KILLED = """
import sys
import featherweight
from featherweight.storage.run import training_state
from featherweight.tasks.heal.settings import HealSettings
training_state.SAVE_SECONDS, training_state.SHARE = 0.0, 0
small, model, out, text, level = sys.argv[1:6]
settings = HealSettings(steps=12, batch=4, length=32, windows=64, held_out=8, score=0, learning_rate=0.02, level=level)
featherweight.heal(small, model, out, settings=settings, text=text, threads=1)
"""


@pytest.mark.parametrize("level", ["model", pytest.param("blocks", marks=LONG)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    heal: Callable[..., Healing], model: Path, small: Path, text: Path, tmp_path: Path, level: Any
) -> None:
    settings = replace(QUICK, score=0, level=level)
    whole = heal(f"whole-{level}", settings)
    out = tmp_path / "killed"
    words = [sys.executable, "-c", KILLED, *map(str, (small, model, out, text, level))]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    artifacts, begun = tmp_path / "killed.feather-run" / "artifacts", time.monotonic()
    while (
        process.poll() is None and not any(artifacts.glob("training-*.safetensors")) and time.monotonic() - begun < 120
    ):
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    left = any(artifacts.glob("training-*.safetensors"))
    assert left or any(artifacts.glob("healed*.safetensors"))
    said: list[dict[str, Any]] = []
    featherweight.heal(small, model, out, settings=settings, text=text, threads=1, observer=said.append)
    assert any("goes on behind step" in event.get("text", "") for event in said) == left
    assert files_of(out) == files_of(whole.out)
    assert not (tmp_path / "killed.feather-run").exists()
