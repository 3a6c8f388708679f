"""Calibrated compression of bad data, weights or statistics: one sentence, early, or a fall-back that is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from feather_command import Outcome, feather_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import make_tiny

SMALL = ("--set", "calibration.sequences=4", "--set", "calibration.length=32", "--threads", "1")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def compress(model: Path, data: Any, out: Path, recipe: str = "gptq-3") -> Outcome:
    return feather_here("compress", model, "--recipe", recipe, "--calibration", data, "--out", out, *SMALL)


def spoil(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def record(out: Path) -> dict[str, Any]:
    layers = json.loads((out / "featherweight.json").read_text())["layers"]
    return next(layer for layer in layers if layer["name"] == DOWN)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "no calibration file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("binary.txt", b"\x80\xff" * 4000, "is not UTF-8"),
        ("line.txt", b"hello\n", "give more text"),
        ("fields.jsonl", b'{"a": 1}\n', "neither text nor a conversation"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 of"),
        ("number.jsonl", b'{"text": 5}\n', "neither text nor a conversation"),
        ("talk.jsonl", b'{"messages": [{"role": "user"}]}\n', "is not a list of messages"),
        ("garbage.safetensors", b"garbage", "is no file of statistics"),
    ],
)
def test_texts(llama: Path, tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    assert said in compress(llama, data, tmp_path / "out").last_sentence()
    assert not (tmp_path / "out").exists()


def test_nan_in_the_last_layer_is_found_before_the_first_is_solved(model: Path, text: Path, tmp_path: Path) -> None:
    spoil(model, lambda tensors: tensors[f"{DOWN}.weight"][3, 5].fill_(torch.nan))
    made = compress(model, text, tmp_path / "out")
    assert f"tensor {DOWN}.weight holds nan at index [3, 5]" in made.last_sentence()
    assert "[1/14]" not in made.errors


def test_nan_in_a_norm(model: Path, text: Path, tmp_path: Path) -> None:
    spoil(model, lambda tensors: tensors["model.norm.weight"][3].fill_(torch.nan))
    assert "tensor model.norm.weight holds nan" in compress(model, text, tmp_path / "out").last_sentence()


def test_activations_that_overflow_fall_back_and_say_so(model: Path, text: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 1e20

    spoil(model, enlarge)
    assert compress(model, text, tmp_path / "out").code == 0
    assert record(tmp_path / "out")["fallback"] == "data-free"


def test_one_repeated_token_gives_a_singular_moment(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 4000)
    assert compress(llama, tmp_path / "a.txt", tmp_path / "out").code == 0
    assert 0 < record(tmp_path / "out")["relative_error"] < 0.5


def test_rotation_takes_models_in_bfloat16(llama: Path, text: Path, tmp_path: Path) -> None:
    made = compress(llama, text, tmp_path / "out", "quarot-gptq")
    assert made.code == 0, made.errors


@pytest.fixture(scope="module")
def statistics(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "gathered.safetensors"
    made = feather_here("calibrate", llama, "--out", path, "--calibration", text, *SMALL)
    assert made.code == 0, made.errors
    return path


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("gptaq", "does not hold cross.*give a text"),
        ("awq", "runs the network"),
        ("trit-2", "runs the network"),
        ("quantlrm", "name that one with base_model= .on the command line --base-model."),
    ],
)
def test_recipes_that_statistics_cannot_serve(
    llama: Path, statistics: Path, tmp_path: Path, recipe: str, said: str
) -> None:
    import re

    sentence = compress(llama, statistics, tmp_path / "out", recipe).last_sentence()
    assert re.search(said, sentence), sentence


def test_statistics_of_another_model(bert: Path, statistics: Path, tmp_path: Path) -> None:
    assert "gathered from another model" in compress(bert, statistics, tmp_path / "out").last_sentence()


@pytest.mark.parametrize("fault", ["nan", "indefinite", "missing", "shape"])
def test_a_spoiled_moment(llama: Path, statistics: Path, tmp_path: Path, fault: str) -> None:
    with safe_open(statistics, "pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(statistics), f"{DOWN}.gram"
    gram = tensors.pop(name)
    spoiled = {"nan": gram * torch.nan, "indefinite": -gram, "shape": gram[:5, :5].contiguous()}
    if fault in spoiled:
        tensors[name] = spoiled[fault]
    save_file(tensors, tmp_path / "spoiled.safetensors", metadata)
    made = compress(llama, tmp_path / "spoiled.safetensors", tmp_path / "out")
    if fault == "shape":
        assert f"layer {DOWN} cannot be compressed" in made.last_sentence()
    else:
        assert made.code == 0, made.errors
        assert record(tmp_path / "out")["fallback"] == "data-free"


def test_misuse_of_calibrate(llama: Path, text: Path, statistics: Path, tmp_path: Path) -> None:
    def said(out: Path, data: Path, *more: Any) -> str:
        return feather_here("calibrate", llama, "--out", out, "--calibration", data, *more, *SMALL).last_sentence()

    out = tmp_path / "made.safetensors"
    assert "exists already" in said(statistics, text)
    assert "must end with .safetensors" in said(tmp_path / "made.txt", text)
    assert "no statistic 'foo'" in said(out, text, "--needs", "gram,foo")
    assert "no statistic 'cross'" in said(out, text, "--needs", "cross")
    assert "is no text but a file of tensors" in said(out, statistics)
    assert not out.exists()


def test_calibrate_replaces_statistics_alone(llama: Path, model: Path, text: Path, tmp_path: Path) -> None:
    """Weights, links to them and other files stay, asked or not; and statistics never lie among a model's weights."""

    def said(model: Path, out: Path, *more: Any) -> str:
        return feather_here("calibrate", model, "--out", out, "--calibration", text, *more, *SMALL).last_sentence()

    weights, link, notes = model / "model.safetensors", tmp_path / "link.safetensors", tmp_path / "my.safetensors"
    link.symlink_to(weights)
    notes.write_text("mine")
    parts = tmp_path / "out.safetensors.parts"
    parts.mkdir()
    (parts / "mine.txt").write_text("mine")
    held = {path: path.read_bytes() for path in (weights, notes, parts / "mine.txt")}
    for more in ((), ("--overwrite",)):
        for out in (weights, link, notes):
            sentence = said(llama, out, *more)
            assert "is no file of statistics, so it is not replaced" in sentence
            assert "--overwrite" not in sentence
        assert "mine.txt is there, which featherweight did not write" in said(
            llama, tmp_path / "out.safetensors", *more
        )
        assert "lies in the folder of the model" in said(model, model / "more.safetensors", *more)
    assert {path: path.read_bytes() for path in held} == held
    assert link.is_symlink()
    made = tmp_path / "made.safetensors"
    assert "exists already" not in feather_here("calibrate", llama, "--out", made, "--calibration", text, *SMALL).errors
    before = made.stat().st_mtime_ns
    assert "replace it with --overwrite" in said(llama, made)
    again = feather_here("calibrate", llama, "--out", made, "--calibration", text, "--overwrite", *SMALL)
    assert again.code == 0, again.errors
    assert made.stat().st_mtime_ns > before


def test_a_base_model_of_another_shape(llama: Path, bert: Path, text: Path, tmp_path: Path) -> None:
    """Said before the network is run."""
    for base, said in ((bert, "lacks model.layers.0.self_attn.q_proj.weight"), (tmp_path / "wide", "has ")):
        if base.name == "wide":
            make_tiny("llama", base, hidden_size=128, head_dim=32)
        made = feather_here("compress", llama, "--recipe", "quantlrm", "--base-model", base, "--calibration", text,
                            "--out", tmp_path / "out", *SMALL)  # fmt: skip
        assert said in made.last_sentence()
        assert "fine-tuned from" in made.last_sentence()
        assert not (tmp_path / "out").exists()


def test_nan_in_a_base_model(llama: Path, model: Path, text: Path, tmp_path: Path) -> None:
    spoil(model, lambda tensors: tensors[f"{DOWN}.weight"][3, 5].fill_(torch.nan))
    made = feather_here("compress", llama, "--recipe", "quantlrm", "--base-model", model, "--calibration", text,
                        "--out", tmp_path / "out", *SMALL)  # fmt: skip
    assert f"tensor {DOWN}.weight holds nan at index [3, 5]" in made.last_sentence()


@pytest.mark.parametrize("recipe", ["awq-3", "adadim-gptq-3"])
def test_searches_over_stacked_experts_say_what_to_do(text: Path, tmp_path: Path, recipe: str) -> None:
    moe = make_tiny("qwen3-moe", tmp_path / "moe", tokenizer=True)
    made = compress(moe, text, tmp_path / "out", recipe)
    if transformers.__version__.startswith("4."):  # a module for each expert
        assert made.code == 0, made.errors
    else:
        assert "mlp.experts.0" in made.last_sentence()
        assert "layers.skip" in made.last_sentence()


@pytest.mark.parametrize("recipe", ["flexround-fast", "discquant-fast", "adadim"])
def test_outputs_that_cannot_be_compared_are_said(model: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 1e20

    spoil(model, enlarge)
    steps = () if recipe == "adadim" else ("--set", "rounding.steps=2")
    made = feather_here("compress", model, "--recipe", recipe, "--calibration", text, "--out", tmp_path / "out", *steps,
                        *SMALL)  # fmt: skip
    assert made.code == 0, made.errors
    assert "was not compared with what there was before: the values computed" in made.errors


def test_one_window_names_the_way_out(llama: Path, text: Path, tmp_path: Path) -> None:
    one = ("--set", "calibration.sequences=1", "--set", "calibration.length=32")
    command = ("compress", llama, "--recipe", "squeezellm", "--calibration", text, "--out", tmp_path / "out", *one)
    assert "1 window with" in feather_here(*command).last_sentence()
    made = feather_here(*command, "--set", "calibration.held_out=0.0")
    assert made.code == 0, made.errors
    assert "nothing is compared" in made.errors
