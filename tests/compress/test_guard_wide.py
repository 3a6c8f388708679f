"""The safeguard holds for every calibrated preset: what came out worse is taken back, a layer or the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.learn import loop as training
from featherweight.methods.quantize.corrections.scale_tuning import ScaleTuning
from featherweight.methods.quantize.rounding import flexround
from featherweight.methods.quantize.transforms.rotation import ResidualRotation
from featherweight.methods.recipe import load_recipe, presets
from featherweight.model.text.windows import load_tokenizer, windows
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.compression import Compression, compress
from featherweight.tasks.compress.data import calibration_needs
from featherweight.tasks.compress.guard import compared
from models import make_tiny
from outputs import Stop, assert_only_output, contents, log_events, stopping

LENGTH, COUNT, HELD_OUT = 48, 16, 4
CHANGES = [
    f"calibration.sequences={COUNT}",
    f"calibration.length={LENGTH}",
    f"calibration.held_out={HELD_OUT / COUNT}",
    "calibration.batch_tokens=96",
]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    return make_tiny("llama", folder, torch.float32, tokenizer=True, initializer_range=0.1, **SHAPE)


@pytest.fixture(scope="module")
def misleading(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose windows all say "aaaa" but for the held-out ones, which have all letters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    settings = CalibrationSettings(sequences=COUNT, length=LENGTH)
    letters = "ABCDEFGHIJKLMNOP"
    path.write_text("".join(letter * LENGTH for letter in letters))
    with Checkpoint.open(source) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder)
        order = [tokenizer.decode(row[:1]) for row in windows(tokenizer, path, settings)]
    assert sorted(order) == list(letters)
    alphabet = "".join(chr(33 + i * 7 % 90) for i in range(LENGTH))
    held_out = order[-HELD_OUT:]
    path.write_text("".join(alphabet if letter in held_out else "a" * LENGTH for letter in letters))
    return path


def made(source: Path, text: Path | None, out: Path, preset: str, *changes: str) -> tuple[Compression, list[str]]:
    """The result and the notes of a run."""
    told: list[dict[str, Any]] = []
    done = compress(
        source, load_recipe(preset, [*CHANGES, *changes]), out, calibration=text, threads=1, observer=told.append
    )
    return done, [fact["text"] for fact in told if fact["event"] == "note"]


def test_fisher_information_that_misleads(source: Path, misleading: Path, tmp_path: Path) -> None:
    done, notes = made(source, misleading, tmp_path / "out", "squeezellm")
    assert all(layer["held_out_error"] > 0 for layer in done.layers)
    fallen = [layer for layer in done.layers if "fallback" in layer]
    assert fallen
    for layer in done.layers:
        assert ("fallback" in layer) == (layer["held_out_error"] > 1.02 * layer["held_out_error_data_free"])
    assert all(any(layer["name"] in note for note in notes) for layer in fallen)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("flexround-3", ["rounding.steps=40", "rounding.learning_rate=0.3", "rounding.checks=1"]),
        ("awq-3", ["transforms=[{kind: awq, clip_shrink: 1.0, clip_steps: 40}]"]),
    ],
)
def test_a_block_that_came_out_worse(
    preset: str,
    changes: list[str],
    source: Path,
    misleading: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its tensors is then what the same grid gives without data; norms and biases are the source's."""

    def careless(*arguments: Any, **named: Any) -> Any:  # the best step on held-out samples would be the start
        return training.minimise(*arguments, **(named | {"check": None}))

    monkeypatch.setattr(flexround, "minimise", careless)
    done, notes = made(source, misleading, tmp_path / "out", preset, *changes)
    grid = load_recipe(preset).grid.settings()
    plain = compress(source, load_recipe("rtn-3", [f"grid={json.dumps(grid)}"]), tmp_path / "plain", threads=1)
    blocks = {layer["block"] for layer in done.layers if layer.get("fallback") == "data-free"}
    assert blocks
    mine, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    for block in blocks:
        assert any(f"block {block} is compressed without data" in note for note in notes)
        inside = [name for name in expected if f"layers.{block}." in name]
        assert len(inside) > 7
        assert inside == [name for name in mine if f"layers.{block}." in name]
        assert all(torch.equal(mine[name], expected[name]) for name in inside)
    assert plain.layers[0]["spec"] == next(x for x in done.layers if x["block"] in blocks)["spec"]
    told = [event for event in log_events(tmp_path / "out") if event["event"] == "block guard"]
    assert {event["block"] for event in told if not event["kept"]} == blocks


def test_a_rounding_of_the_whole_model_that_came_out_worse(source: Path, misleading: Path, tmp_path: Path) -> None:
    settings = ["rounding.steps=24", "rounding.rho=1e6", "rounding.kappa=50.0", "rounding.learning_rate=0.5"]
    done, notes = made(source, misleading, tmp_path / "out", "discquant-fast", *settings)
    stated = json.loads((tmp_path / "out" / "featherweight.json").read_text())["whole_model"]
    assert [(entry["step"], entry["kept"]) for entry in stated] == [("the rounding discquant", False)]
    assert stated[0]["after"] > stated[0]["before"]
    assert any("the rounding discquant" in note and "the former state is kept" in note for note in notes)
    assert all(layer["fallback"] == "data-free" for layer in done.layers)
    grid = load_recipe("discquant-fast").grid.settings()
    compress(source, load_recipe("rtn-3", [f"grid={json.dumps(grid)}"]), tmp_path / "plain", threads=1)
    mine, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert mine == expected


TUNED = (
    "rounding={kind: hessian}",
    "corrections=[{kind: scale-tuning, steps: 8, learning_rate: 0.003, norms: true}]",
)


@pytest.mark.parametrize("spoiled", [False, True])
def test_tuned_scales_that_came_out_worse(
    spoiled: bool, source: Path, misleading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes and norms of before stay; tuning that helps is kept, and both are stated."""
    text = misleading if spoiled else None
    made(source, text, tmp_path / "plain", "rtn-3", TUNED[0])
    honest = ScaleTuning.tune_model

    def spoil(self: ScaleTuning, model: Any, codes: Any, *rest: Any) -> Any:
        tuned = honest(self, model, codes, *rest)
        for name in {layer.norm for layer in model.layers.values() if layer.norm} if spoiled else ():
            model.set_tensor(name, model.tensor(name) * 3)
        return tuned

    monkeypatch.setattr(ScaleTuning, "tune_model", spoil)
    _, notes = made(source, text, tmp_path / "out", "rtn-3", *TUNED)
    stated = json.loads((tmp_path / "out" / "featherweight.json").read_text())["whole_model"]
    assert [(entry["step"], entry["kept"]) for entry in stated] == [("the correction scale-tuning", not spoiled)]
    assert (stated[0]["after"] > stated[0]["before"]) == spoiled
    assert any("scale-tuning" in note and ("is kept" in note) for note in notes)
    mine, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert (mine == expected) == spoiled


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_that_came_out_worse(
    tied: bool, source: Path, misleading: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is what it was before: weights, norms, embedding, head and configuration."""
    if tied:
        source = make_tiny("llama", tmp_path / "tied", torch.float32, tokenizer=True, tie_word_embeddings=True, **SHAPE)
    honest = ResidualRotation.transform_model

    def spoil(self: ResidualRotation, model: Any, *rest: Any) -> None:
        honest(self, model, *rest)
        model.set_tensor("lm_head.weight", 50 * model.tensor("lm_head.weight"))

    monkeypatch.setattr(ResidualRotation, "transform_model", spoil)
    plain = ("rounding={kind: hessian}",)
    made(source, misleading, tmp_path / "plain", "rtn-3", *plain)
    _, notes = made(source, misleading, tmp_path / "out", "rtn-3", *plain, "transforms=[{kind: rotation}]")
    assert any("the transform rotation" in note and "the former state is kept" in note for note in notes)
    mine, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "plain")]
    for config in configs:
        config.pop("quantization_config")
    assert configs[0] == configs[1]


def test_a_sound_rotation_stays(source: Path, misleading: Path, tmp_path: Path) -> None:
    made(source, misleading, tmp_path / "out", "rtn-3", "rounding={kind: hessian}", "transforms=[{kind: rotation}]")
    stated = json.loads((tmp_path / "out" / "featherweight.json").read_text())["whole_model"]
    assert [entry["kept"] for entry in stated] == [True]
    assert stated[0]["after"] == pytest.approx(stated[0]["before"], abs=1e-2)
    assert float(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].std()) == 0


def test_without_held_out_windows_the_run_says_that_nothing_is_compared(
    source: Path, misleading: Path, tmp_path: Path
) -> None:
    done, notes = made(source, misleading, tmp_path / "out", "squeezellm", "calibration.held_out=0.0")
    assert any("nothing is compared with its data-free form" in note for note in notes)
    assert not any("held_out_error" in layer for layer in done.layers)


@pytest.mark.parametrize("preset", [name for name in presets() if load_recipe(name).calibrated])
def test_every_calibrated_preset_keeps_windows_apart(preset: str) -> None:
    """And compares on them whatever sees data: layers, blocks or the whole model."""
    recipe = load_recipe(preset)
    assert "held_out_gram" in calibration_needs(recipe)
    wide = {choice.scope for choice in (recipe.rounding, *recipe.transforms, *recipe.corrections)} - {"layer"}
    assert compared(recipe.treatment, recipe.calibration.held_out) >= (wide or {"layer"})
    assert not compared(recipe.treatment, 0.0)


@pytest.mark.parametrize("layer", [4, 10])
@pytest.mark.parametrize("preset", ["awq-3", "d2quant-3"])
def test_a_run_stopped_within_a_block_that_is_compared_resumes_with_the_same_result(
    preset: str, layer: int, source: Path, misleading: Path, tmp_path: Path
) -> None:
    made(source, misleading, tmp_path / "whole" / "out", preset)
    out, recipe = tmp_path / "cut" / "out", load_recipe(preset, CHANGES)
    with pytest.raises(Stop):
        compress(source, recipe, out, calibration=misleading, threads=1, observer=stopping("layer", layer))
    made(source, misleading, out, preset)
    assert_only_output(out, contents(tmp_path / "whole" / "out"))
