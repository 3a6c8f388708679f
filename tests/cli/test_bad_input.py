"""Whatever is wrong with what a person gives: exit code 1 and one sentence that names it; nothing written."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feather_command import feather, feather_here
from safetensors.torch import load_file, save_file

from models import make_tiny

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def compress(model: Path, *more: Any) -> Any:
    out = model.parent / "made" / "out"
    recipe = () if "--recipe" in more else ("--recipe", "rtn-4")
    outcome = feather_here("compress", model, *recipe, "--out", out, *more)
    assert not out.exists()
    return outcome


def set_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def set_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


# The model.


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def list_for_config(model: Path) -> None:
    (model / "config.json").write_text("[1, 2]")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def unknown_architecture(model: Path) -> None:
    set_config(model, model_type="perceiver-of-doors", architectures=["DoorPerceiver"])
    save_file({"door.handle": torch.ones(3), "door.frame": torch.ones(4, 4)}, model / "model.safetensors")


def missing_block(model: Path) -> None:
    set_tensors(model, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name])


def missing_shard(model: Path) -> None:
    shutil.rmtree(model)
    make_tiny("llama", model, shard_size="60KB")
    (model / "model-00002-of-00004.safetensors").unlink()


def truncated_shard(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4096)


def empty_shard(model: Path) -> None:
    os.truncate(model / "model.safetensors", 0)


def hostile_length(model: Path) -> None:
    (model / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def hostile_nesting(model: Path) -> None:
    header = b'{"a":' + b"[" * 200_000
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def hostile_overlap(model: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))


def adapter_only(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "adapter_config.json").write_text("{}")


def nan_in_linear(model: Path) -> None:
    set_tensors(model, lambda t: t[DOWN].__setitem__((3, 5), math.nan))


def infinity_in_embedding(model: Path) -> None:
    set_tensors(model, lambda t: t["model.embed_tokens.weight"].__setitem__((17, 2), -math.inf))


def eight_bit_floats(model: Path) -> None:
    set_tensors(model, lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}))


def integers(model: Path) -> None:
    set_tensors(model, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}))


def other_quantizer(model: Path) -> None:
    set_config(model, quantization_config={"quant_method": "gptq", "bits": 4})


SPOILED = {
    no_config: "has no config.json",
    broken_config: "config.json is not valid JSON",
    list_for_config: "config.json must hold a JSON object",
    no_weights: "has no weights",
    unknown_architecture: "DoorPerceiver",
    missing_block: "lacks model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight",
    missing_shard: "lacks the shard model-00002-of-00004.safetensors",
    truncated_shard: "model.safetensors is not a valid safetensors file: it is truncated, 4096 bytes",
    empty_shard: "it is truncated, 0 bytes",
    hostile_length: "header claims 4611686018427387904 bytes",
    hostile_nesting: "header is not JSON",
    hostile_overlap: "tensor 'b' overlaps 'a'",
    pickle_only: "pytorch_model.bin is a pickle",
    adapter_only: "is a PEFT adapter",
    nan_in_linear: f"tensor {DOWN} holds nan at index [3, 5]",
    infinity_in_embedding: "tensor model.embed_tokens.weight holds -inf at index [17, 2]",
    eight_bit_floats: f"holds the codes of a quantised model ({DOWN}, F8_E4M3)",
    integers: f"holds the codes of a quantised model ({DOWN}, I8)",
    other_quantizer: "is quantised already (quant_method 'gptq')",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_model(model: Path, spoil: Callable[[Path], None]) -> None:
    spoil(model)
    assert SPOILED[spoil] in compress(model).last_sentence()


@pytest.mark.parametrize("spoil", [s for s in SPOILED if "nan" not in s.__name__ and "infinity" not in s.__name__])
def test_model_of_a_plan(model: Path, spoil: Callable[[Path], None]) -> None:
    spoil(model)
    assert SPOILED[spoil] in feather_here("plan", model, "--recipe", "rtn-4").sentence()


def test_model_that_is_not_there(tmp_path: Path) -> None:
    for command in (["compress", "--recipe", "rtn-4", "--out", tmp_path / "o"], ["plan", "--recipe", "rtn-4"]):
        assert "./nowhere" in feather_here(*command, "./nowhere").sentence()
    for command in (["eval"], ["inspect"], ["verify"], ["bench"], ["generate", "--prompt", "a"], ["chat"]):
        assert "nowhere" in feather_here(*command, "./nowhere").sentence()


def test_model_compressed_again(compressed: Path, tmp_path: Path) -> None:
    """It works, and it is said."""
    done = feather_here("compress", compressed, "--recipe", "rtn-4", "--out", tmp_path / "out")
    assert done.code == 0
    said = " ".join((done.output + done.errors).split())
    assert "is compressed already (recipe" in said
    assert "what is lost adds to what it has lost before" in said


# The recipe and the options.

OPTIONS = {
    ("--recipe", "ptqpt"): "there is no recipe called 'ptqpt' (did you mean 'ptqtp'?)",
    ("--recipe", "./mine.yaml"): "there is no recipe file ./mine.yaml",
    ("--set", "grid.bitts=3"): "there is no field grid.bitts (did you mean 'bits'?)",
    ("--set", "gird.bits=3"): "there is no field gird (did you mean 'grid'?)",
    ("--set", "layers.skipp=[a]"): "there is no field layers.skipp (did you mean 'skip'?)",
    ("--set", "grid.group_size=0"): "field grid.group_size is 0: input should be greater than or equal to 1",
    ("--set", "grid.bits=9"): "field grid.bits is 9",
    ("--set", "grid.bits=four"): "field grid.bits is 'four'",
    ("--set", "grid.kind=unifrom"): "there is no grid called 'unifrom' (did you mean 'uniform'?)",
    ("--set", "grid=4"): "field grid must be a mapping with a kind",
    ("--set", "bits"): "a change is written FIELD=VALUE",
    ("--set", "name.x=1"): "names a field inside 'name', which is not a mapping",
    ("--set", "grid.bits=[3"): "is not valid YAML",
    ("--set", "title=2024-99-99"): "is not valid YAML",
    ("--set", "grid.bits=.nan"): "field grid.bits is nan",
    ("--recipe", "ptqtp", "--set", "grid.tolerance=.inf"): "field grid.tolerance is inf",
    ("--recipe", "ptqtp", "--set", "grid.planes=0"): "field grid.planes is 0",
    ("--max-memory", "lots"): "'lots' is not a size; write it like 800MB",
    ("--max-memory", "1MB"): "--max-memory 1 MB is too little: layer model.layers.0.",
    ("--calibration", "./nothing.txt"): "there is no calibration file ./nothing.txt",
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_option(llama: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = () if "--recipe" in options else ("--recipe", "rtn-4")
    said = feather_here("compress", llama, *recipe, *options, "--out", tmp_path / "out").sentence()
    assert OPTIONS[options] in said
    assert list(tmp_path.iterdir()) == []


RECIPES = {
    "grid: {kind: uniform, bits: 4}\nrouding: {kind: nearest}": "there is no field rouding (did you mean 'rounding'?)",
    "grid: {kind: trit-planes, plane: 2}": "there is no field grid.plane (did you mean 'planes'?)",
    "grid: {kind: uniform, group_size: 0}": "field grid.group_size is 0",
    "rounding: {kind: nearest}": "field grid is missing",
    "grid: {kind: uniform}\ntransforms: hadamard": "field transforms must be a list",
    "grid: {kind: uniform}\ntransforms: [{kind: hadamart}]": "there is no transform called 'hadamart'",
    "grid: {kind: uniform}\noverrides: [{grid: {bits: 3}}]": "match is missing",
    "- a\n- b": "a recipe is a mapping of fields, found list",
    "": "a recipe is a mapping of fields, found NoneType",
    "grid: {kind: uniform": "cannot be read",
    "grid: *nothing": "cannot be read",
    "title: 2024-13-41\ngrid: {kind: uniform}": "cannot be read",
    "[" * 1500: "cannot be read",
    "1: 2\ngrid: {kind: uniform}": "recipe",
    "!!python/object/apply:os.system ['touch hacked']": "cannot be read",
    "\x00\x01": "cannot be read",
}


@pytest.mark.parametrize("content", RECIPES, ids=lambda content: repr(content[:30]))
def test_recipe_file(llama: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    said = feather_here("compress", llama, "--recipe", path, "--out", tmp_path / "out").sentence()
    assert RECIPES[content] in said
    assert str(path) in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_recipe_file_that_is_no_text(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(bytes(range(128, 256)))
    assert "cannot be read" in feather_here("plan", llama, "--recipe", path).sentence()


def test_wrong_use_names_the_option(llama: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (["compress", llama, "--recipe", "rtn-4"], "--out"),
        (["compress", llama, "--out", tmp_path / "o"], "--recipe"),
        (["compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "o", "--threads", "0"], "--threads"),
        (["compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "o", "--seed", "one"], "--seed"),
        (["generate", llama], "--prompt"),
        (["comprss"], "comprss"),
        (["eval", llama, "--context", "1"], "--context"),
    ):
        outcome = feather_here(*arguments)
        assert outcome.code == 2
        assert named in outcome.errors
    assert list(tmp_path.iterdir()) == []


def test_json_that_cannot_be_written_keeps_the_output(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    command = ("compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "out", "--json")
    assert "is no file" in feather_here(*command, tmp_path / "folder").sentence()
    assert not (tmp_path / "out").exists()  # said before the work
    assert "cannot write" in feather_here(*command, tmp_path / "folder" / ("x" * 300)).last_sentence()
    assert feather_here(*command, tmp_path / "new" / "result.json").code == 0
    assert json.loads((tmp_path / "new" / "result.json").read_text())["already_complete"]
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "new", "out", "out.log.jsonl"}


# Measuring.


def test_texts(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t \n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "half.xz").write_bytes(b"\xfd7zXZ\x00")
    for name, sentence in (
        ("empty.txt", "is empty"),
        ("blank.txt", "is empty"),
        ("short.txt", "the text has 1 token"),
        ("latin.txt", "is not UTF-8 (byte 1)"),
        ("half.xz", "is not a whole .xz file"),
        ("missing.txt", "there is no text file"),
        (".", "is a folder: give a file"),
    ):
        assert sentence in feather_here("eval", llama, "--text", tmp_path / name).last_sentence()


PROTOCOLS = {
    ("--protocol", "onw"): "there is no protocol called 'onw' (did you mean 'own'?)",
    ("--protocol", "2048"): "needs a context of 2048 tokens and the model has 128",
    ("--protocol", "llama.cpp"): "needs a context of 512 tokens and the model has 128",
    ("--context", "129"): "needs a context of 129 tokens and the model has 128",
    ("--limit", "64", "--context", "100"): "needs at least 100 tokens for one window and the text has 64",
    ("--dtype", "float31"): "dtype is 'float31'",
}


@pytest.mark.parametrize("options", PROTOCOLS, ids=lambda options: " ".join(options))
def test_protocol(llama: Path, text: Path, options: tuple[str, ...]) -> None:
    assert PROTOCOLS[options] in feather_here("eval", llama, "--text", text, *options).last_sentence()


def test_eval_of_what_is_no_model(model: Path, text: Path, bert: Path) -> None:
    assert "no next-token perplexity" in feather_here("eval", bert, "--text", text).last_sentence()
    set_config(model, vocab_size=100)
    assert str(model) in feather_here("eval", model, "--text", text).last_sentence()
    (model / "model.safetensors").unlink()
    assert str(model) in feather_here("eval", model, "--text", text).last_sentence()
    assert "has no config.json" in feather_here("eval", model.parent, "--text", text).last_sentence()


@pytest.mark.parametrize("spoil", [truncated_shard, hostile_length, empty_shard, broken_config, no_weights])
@pytest.mark.parametrize("command", [("eval",), ("generate", "--prompt", "a"), ("bench",)], ids=lambda c: c[0])
def test_using_a_damaged_folder(compressed: Path, tmp_path: Path, spoil: Any, command: tuple[str, ...]) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    spoil(folder)
    assert str(folder) in feather_here(command[0], folder, *command[1:]).last_sentence()


def test_models_of_different_vocabularies(llama: Path, text: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", tokenizer=True, vocab_size=300)
    said = feather_here("eval", other, "--against", llama, "--text", text).last_sentence()
    assert "vocabularies of 300 and 256 tokens" in said


# Writing text.


def test_generate(model: Path, bert: Path) -> None:
    assert "is not a model that writes text" in feather_here("generate", bert, "--prompt", "a").sentence()
    assert "the prompt is empty" in feather_here("generate", model, "--prompt", "").sentence()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer" in feather_here("generate", model, "--prompt", "a").sentence()


@pytest.mark.slow
def test_in_processes_of_their_own(model: Path, tmp_path: Path) -> None:
    """The same as a person sees it: nothing but the sentence, and no traceback from anywhere."""
    nan_in_linear(model)
    said = feather("compress", model, "--recipe", "ptqtp", "--out", tmp_path / "out").last_sentence()
    assert f"tensor {DOWN} holds nan at index [3, 5]" in said
    truncated_shard(model)
    assert "model.safetensors is not a valid safetensors file: it is truncated" in feather("eval", model).sentence()
