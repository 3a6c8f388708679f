"""Runs with calibration: resume gives the same bytes, what cannot be calibrated falls back with a word."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from featherweight import load
from featherweight.errors import FeatherError
from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.plan import Plan, make_plan
from outputs import Stop, assert_only_output, compress_and_die, contents, in_process, log_events, stopping

TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(400))
SMALL = ("calibration.sequences=8", "calibration.length=64", "calibration.held_out=0.25")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def options_with(text: Path) -> dict[str, Any]:
    return {
        "recipe": "rtn-3",
        "changes": (*SMALL, "grid.group_size=32", "rounding={kind: hessian}"),
        "calibration": text,
        "threads": 1,
    }


@pytest.fixture
def options(text: Path) -> dict[str, Any]:
    return options_with(text)


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of a run that nothing disturbs, in this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(llama, out=out, **options_with(text))
    return contents(out)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same from a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = {name: value for name, value in options_with(text).items() if name != "threads"}
    assert in_process(compress_and_die, str(llama), str(out), options, None) == 0
    return contents(out)


def test_layers_are_solved_on_what_reaches_them(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    made = compress(llama, out=tmp_path / "out", **options)
    free = compress(llama, out=tmp_path / "free", **(options | {"recipe": "rtn-3", "changes": ("grid.group_size=32",)}))
    assert len(made.layers) == len(free.layers) == 14
    assert made.bits_per_weight == free.bits_per_weight
    errors = {layer["name"]: layer["output_error"] for layer in made.layers}
    assert all(0 < error < 1 for error in errors.values())
    for layer in made.layers:  # the same grid without data misses more of the outputs on held-out text
        assert layer["held_out_error"] <= 1.02 * layer["held_out_error_data_free"] or "fallback" in layer
    better = [layer["held_out_error"] < layer["held_out_error_data_free"] for layer in made.layers]
    assert sum(better) > len(better) / 2
    model, _ = load(tmp_path / "out", dtype="float32")
    logits = model(torch.arange(40)[None]).logits
    assert torch.isfinite(logits).all()
    assert inspect_folder(tmp_path / "out")


@pytest.mark.parametrize("layer", [1, 3, 6, 8, 13])
def test_an_interrupted_run_resumes_with_the_same_result(
    llama: Path, tmp_path: Path, options: dict[str, Any], uninterrupted: dict[str, bytes], layer: int
) -> None:
    out = tmp_path / "cut" / "out"
    with pytest.raises(Stop):
        compress(llama, out=out, observer=stopping("layer", layer), **options)
    result = compress(llama, out=out, **options)
    assert result.resumed == layer
    assert_only_output(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [5, 23, 41, 60, 77])
def test_killed_at_file_operations(
    llama: Path, tmp_path: Path, options: dict[str, Any], undisturbed: dict[str, bytes], moment: int
) -> None:
    options = {name: value for name, value in options.items() if name != "threads"}
    out = tmp_path / "cut" / "out"
    out.parent.mkdir()
    assert in_process(compress_and_die, str(llama), str(out), options, ("file", moment)) == -9
    assert in_process(compress_and_die, str(llama), str(out), options, None) == 0
    assert_only_output(out, undisturbed)


def test_the_seed_of_the_text_is_part_of_the_run(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    first = compress(llama, out=tmp_path / "a", **options)
    other = options | {"changes": (*options["changes"], "calibration.seed=1")}
    second = compress(llama, out=tmp_path / "b", **other)
    assert [layer["output_error"] for layer in first.layers] != [layer["output_error"] for layer in second.layers]


def test_starved_experts_fall_back_and_say_so(
    tiny: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tiny("qwen3-moe", tokenizer=True, num_experts=16, num_experts_per_tok=1)
    few = options | {"changes": (*options["changes"], "calibration.sequences=2", "calibration.length=16")}
    seen: list[dict[str, Any]] = []
    made = compress(model, out=tmp_path / "out", observer=seen.append, **few)
    fallen = [layer for layer in made.layers if layer.get("fallback") == "data-free"]
    assert fallen
    assert any("tokens" in layer["reason"] for layer in fallen)
    notes = [event["text"] for event in seen if event["event"] == "note"]
    assert any(fallen[0]["name"] in note for note in notes)
    model, _ = load(tmp_path / "out", dtype="float32")
    assert torch.isfinite(model(torch.arange(30)[None]).logits).all()


def test_every_family_runs(tiny: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:
    for family in ("gpt2", "bert", "mixtral", "opt"):
        made = compress(tiny(family, tokenizer=True), out=tmp_path / family, **options)
        measured = [layer for layer in made.layers if "output_error" in layer]
        assert len(measured) > len(made.layers) / 2, family


def test_statistics_are_gathered_once_and_used_again(
    llama: Path, tmp_path: Path, options: dict[str, Any], text: Path
) -> None:
    from featherweight.tasks.compress.gather import gather_statistics

    file = tmp_path / "statistics.safetensors"
    changes = {
        change.split("=")[0].removeprefix("calibration."): yaml.safe_load(change.split("=")[1]) for change in SMALL
    }
    gather_statistics(llama, file, text, ("gram", "held_out_gram"), changes)
    made = compress(llama, out=tmp_path / "out", **(options | {"calibration": file}))
    assert all("held_out_error" in layer for layer in made.layers)
    with pytest.raises(FeatherError, match="cross"):
        compress(
            llama,
            out=tmp_path / "no",
            **(options | {"calibration": file, "changes": (*options["changes"], "rounding.alpha=0.25")}),
        )


def test_the_head_is_calibrated_too(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with_head = options | {"changes": (*options["changes"], "layers.head=true")}
    made = compress(llama, out=tmp_path / "out", **with_head)
    head = next(layer for layer in made.layers if layer["role"] == "lm_head")
    assert "output_error" in head


def test_too_little_text(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(FeatherError, match="tokens"):
        compress(llama, out=tmp_path / "out", **(options | {"calibration": short}))
    assert not (tmp_path / "out").exists()


def test_the_log_tells_of_every_block(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    compress(llama, out=tmp_path / "out", **options)
    kinds = [event["event"] for event in log_events(tmp_path / "out")]
    assert kinds.count("block") == 2
    assert kinds.count("layer") == 14


@pytest.mark.slow
def test_a_run_stopped_while_scales_are_tuned_resumes_with_the_same_result(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tuned = options | {"changes": (*options["changes"], "corrections=[{kind: scale-tuning, steps: 4, checks: 4}]")}
    compress(llama, out=tmp_path / "whole" / "out", **tuned)
    expected = contents(tmp_path / "whole" / "out")
    out = tmp_path / "cut" / "out"
    with pytest.raises(Stop):
        compress(llama, out=out, observer=stopping("scale-tuning", 2), **tuned)
    with pytest.raises(Stop):
        compress(llama, out=out, observer=stopping("shard"), **tuned)
    result = compress(llama, out=out, **tuned)
    assert result.resumed == 14
    assert_only_output(out, expected)
    plain = compress(llama, out=tmp_path / "plain", **options)
    assert [x["relative_error"] for x in result.layers] != [x["relative_error"] for x in plain.layers]


def test_training_is_planned_for(llama: Path) -> None:
    """Memory and disk of choices that train: by weights, and by the tokens of a pass."""
    few = ("calibration.sequences=8", "calibration.length=64")

    def planned(preset: str, *changes: str) -> Plan:
        with Checkpoint.open(llama) as checkpoint:
            return make_plan(checkpoint, load_recipe(preset, [*few, *changes]), 1)

    learned = planned("discquant-fast")
    assert learned.calibration_bytes() > planned("gptq").calibration_bytes() + 40 * learned.weights
    assert planned("discquant-fast", "rounding.batch_size=32").calibration_bytes() > learned.calibration_bytes()
    assert learned.disk_bytes == learned.output_bytes + learned.code_bytes + 32 * learned.weights
    tuned = planned("trit-2")
    free = planned("trit-2", "corrections=[]")
    assert tuned.calibration_bytes() > free.calibration_bytes() + 16 * tuned.weights
    assert tuned.disk_bytes >= free.disk_bytes + free.code_bytes
    assert planned("rtn-3", "corrections=[{kind: scale-tuning}]").training_state_bytes > 32 * tuned.weights // 128
    by_block, blocks = planned("flexround-fast", "calibration.batch_tokens=64"), 2
    assert 44 * by_block.weights // blocks < by_block.calibration_bytes() < learned.calibration_bytes()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ((), "take fewer or shorter windows than 8 of 64 tokens"),
        (
            ("corrections=[{kind: scale-tuning, against: model}]",),
            "the whole model is in memory at once for scale-tuning;",
        ),
        (("transforms=[{kind: rotation}]",), "the whole model is in memory at once for rotation;"),
        (
            ("grid={kind: codebook, bits: 3, weighting: fisher}", "rounding={kind: nearest}"),
            "it takes gradients of the whole model",
        ),
    ],
)
def test_too_little_memory_is_told_before_the_work(
    llama: Path,
    tmp_path: Path,
    options: dict[str, Any],
    changes: tuple[str, ...],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featherweight.tasks.compress.plan.available_bytes", lambda: 10**7)
    options["changes"] += changes
    with pytest.raises(FeatherError, match=r"recipe rtn-3 needs about [\d.]+ MB of memory .* 10 MB are free") as caught:
        compress(llama, out=tmp_path / "out", **options)
    assert advice in str(caught.value)
    for recipe in re.findall(r"trit-\d-blockwise|gptq", str(caught.value)):  # what is named must exist, and do
        proposed = load_recipe(recipe)
        assert "fisher" not in proposed.needs
        assert not any(getattr(choice, "scope", "layer") == "model" for choice in proposed.choices)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FeatherError, match="--max-memory 10 MB is too little: recipe rtn-3 needs about") as caught:
        compress(llama, out=tmp_path / "out", max_memory="10MB", **options)
    assert advice in str(caught.value)


def test_a_stated_limit_overrules_the_free_memory(
    llama: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.tasks.compress.plan.available_bytes", lambda: 10**7)
    assert compress(llama, out=tmp_path / "out", max_memory="64GB", **options).layers
    free = compress(llama, "rtn-3", tmp_path / "free", changes=("grid.group_size=32",))  # runs no network
    assert free.layers
