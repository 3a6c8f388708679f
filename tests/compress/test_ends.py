"""Token embedding and output layer as layers: tied stays tied, one code serves both, what is stored is what runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.errors import RecipeError
from featherweight.methods.recipe import load_recipe, recipe_from
from featherweight.model.decoder.model import NativeModel
from featherweight.model.layers.coded import CodedForward
from featherweight.model.layers.tied import TiedLinear
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.checkpoint.size import bytes_per_token, measure_size
from featherweight.storage.codes import code_from, code_layout
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.plan import make_plan

SIX = {"grid": {"kind": "uniform", "bits": 6, "group_size": 32}}
PLAIN = {"name": "ends", "grid": {"kind": "uniform", "bits": 4, "group_size": 32}}
BOTH = {**PLAIN, "embedding": SIX, "head": SIX}
SHORT = ("calibration.sequences=6", "calibration.length=32")
FAMILIES = ("llama", "gemma2", "gemma3", "gpt2", "opt", "gpt-neox", "qwen3-moe", "bert")


def decoded(out: Path) -> dict[str, Tensor]:
    """Module -> matrix that its stored tensors stand for."""
    config = json.loads((out / "config.json").read_text())
    stored = load_file(out / "model.safetensors")
    specs = module_specs(config["quantization_config"])
    return {m: code_from(s, {n: stored[f"{m}.{n}"] for n in code_layout(s)}).decode() for m, s in specs.items()}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def expected_logits(source: Path, out: Path, ids: Tensor) -> Tensor:
    """The original's class with every compressed matrix replaced by what is stored for it."""
    model, _ = featherweight.load(source, dtype="float32")
    modules = dict(model.named_modules())
    for name, matrix in decoded(out).items():
        module = modules[name] if name in modules else model.get_output_embeddings()  # renamed while loading
        module.weight.data.copy_(matrix.T if type(module).__name__ == "Conv1D" else matrix)
    return logits_of(model, ids)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_runs_is_what_is_stored(tiny: Any, tmp_path: Path, family: str, tied: bool) -> None:
    source = tiny(family, tie_word_embeddings=tied)
    skipped = ["expert"] if family == "qwen3-moe" else []  # stacked in memory, one by one in the file
    recipe = {**BOTH, "layers": {"skip": skipped}}
    out = compress(source, recipe_from(recipe, "here"), tmp_path / "out").out
    ids = torch.arange(3, 43).view(2, 20)
    model, _ = featherweight.load(out, dtype="float32")
    torch.testing.assert_close(logits_of(model, ids), expected_logits(source, out, ids), rtol=1e-4, atol=1e-4)
    assert json.loads((out / "config.json").read_text()).get("tie_word_embeddings", tied) == tied
    assert isinstance(model.get_input_embeddings(), CodedForward)
    assert isinstance(model.get_output_embeddings(), TiedLinear) == tied
    assert verify(out).whole


def test_one_code_for_both(tiny: Any, tmp_path: Path) -> None:
    source = tiny("llama", tie_word_embeddings=True, vocab_size=131, hidden_size=56, head_dim=14)
    result = compress(source, recipe_from(BOTH, "here"), tmp_path / "out")
    stored = load_file(result.out / "model.safetensors")
    assert not [name for name in stored if "lm_head" in name or name == "model.embed_tokens.weight"]
    assert result.layers[-1]["name"] == "model.embed_tokens"
    nbytes = sum(t.numel() * t.element_size() for n, t in stored.items() if n.startswith("model.embed_tokens."))
    assert result.bits_per_weight_outside == pytest.approx(8 * nbytes / (131 * 56))
    assert result.bits_per_weight == pytest.approx(result.bits_per_weight_linear)  # without the embedding
    size = measure_size(result.out)
    assert size.linear_bits == pytest.approx(result.bits_per_weight_linear)
    assert size.tensor_bytes == result.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert bytes_per_token(result.out) == result.bytes  # every token reads the output layer
    assert "model.embed_tokens" in [layer["name"] for layer in inspect_folder(result.out)["layers"]]
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, recipe_from(BOTH, "here"))
    assert plan.output_bytes == result.bytes
    assert [f.kind for f in plan.fates if f.name == "model.embed_tokens.weight"] == ["replaced"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_agrees(tiny: Any, tmp_path: Path, tied: bool) -> None:
    source = tiny("llama", tie_word_embeddings=tied, tokenizer=True)
    out = compress(source, recipe_from(BOTH, "here"), tmp_path / "out").out
    ids = torch.arange(3, 23)
    model, _ = featherweight.load(out, dtype="float32")
    found = NativeModel.open(out, threads=1, precision="float").forward(ids.tolist())
    wanted = logits_of(model, ids[None])[0]
    torch.testing.assert_close(found.float(), wanted if len(found) == 20 else wanted[-1:], rtol=2e-2, atol=2e-2)


def test_it_is_saved_and_loaded_tied(tiny: Any, tmp_path: Path) -> None:
    out = compress(tiny("llama", tie_word_embeddings=True), recipe_from(BOTH, "here"), tmp_path / "out").out
    ids = torch.arange(3, 23)[None]
    model, _ = featherweight.load(out, dtype="float32")
    model.save_pretrained(tmp_path / "again")
    again, _ = featherweight.load(tmp_path / "again", dtype="float32")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()
    again.tie_weights()  # asked again, it is tied still
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_a_stored_copy_of_the_embedding_is_left_out(tiny: Any, tmp_path: Path) -> None:
    source = tiny("llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = compress(source, recipe_from(BOTH, "here"), tmp_path / "out")
    assert result.tensors["dropped"] == {"lm_head.weight": "a copy of model.embed_tokens.weight, which is compressed"}
    assert verify(result.out).whole


@pytest.mark.parametrize("tied", [True, False])
def test_calibrated_as_a_layer(tiny: Any, tmp_path: Path, tied: bool) -> None:
    """`same` under GPTQ: the statistics are those of the output layer's input, and rounding heeds them."""
    source = tiny("llama", tie_word_embeddings=tied, tokenizer=True)
    rows = {}
    for name, change in (("same", "head=same"), ("nearest", "head={grid: {}}")):
        result = compress(source, "gptq-3", tmp_path / name, changes=(*SHORT, change), threads=1)
        rows[name] = {record["name"]: record for record in result.layers}
        assert verify(result.out).whole
    module = "model.embed_tokens" if tied else "lm_head"
    assert rows["same"][module]["output_error"] > 0
    assert "output_error" not in rows["nearest"][module]
    assert rows["same"][module]["relative_error"] != rows["nearest"][module]["relative_error"]
    others = [name for name in rows["same"] if name != module]
    differing = [n for n in others if rows["same"][n]["relative_error"] != rows["nearest"][n]["relative_error"]]
    assert bool(differing) == tied  # an embedding that needs no data is what the blocks are calibrated on


def test_blocks_are_calibrated_on_the_coded_embedding(tiny: Any, tmp_path: Path) -> None:
    """As if the embedding had been replaced by what its code decodes to before anything began."""
    source = tiny("llama", tie_word_embeddings=False, tokenizer=True, dtype=torch.float32)
    coarse = "embedding={grid: {kind: uniform, bits: 2, group_size: 32}}"
    out = compress(source, "gptq", tmp_path / "out", changes=(*SHORT, coarse), threads=1).out
    matrices = decoded(out)
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in source.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = matrices.pop("model.embed_tokens")
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    wanted = decoded(compress(changed, "gptq", tmp_path / "wanted", changes=SHORT, threads=1).out)
    assert wanted.keys() == matrices.keys()
    assert all(torch.equal(wanted[name], matrices[name]) for name in wanted)


@pytest.mark.parametrize("recipe", ["gptq", "rtn-4"])
def test_time_left_does_not_follow_from_an_embedding_rounded_at_once(tiny: Any, tmp_path: Path, recipe: str) -> None:
    """Where the network runs, its blocks alone tell the pace; all weights count where they are alike."""
    source = tiny("llama", tie_word_embeddings=True, tokenizer=True)
    events: list[Any] = []
    changes = (*(SHORT if recipe == "gptq" else ()), "embedding=6bit")
    compress(source, recipe, tmp_path / "out", changes=changes, threads=1, observer=events.append)
    layers = [event for event in events if event["event"] == "layer"]
    assert recipe != "gptq" or layers[0]["name"] == "model.embed_tokens"
    assert (layers[0]["seconds_left"] is None) == (layers[0]["weights_per_second"] is None) == (recipe == "gptq")
    assert all(event["seconds_left"] > 0 for event in layers[1:-1])
    assert layers[-1]["seconds_left"] == 0


@pytest.mark.parametrize("name", ["trit-2", "trit-2-blockwise", "trit-1"])
@pytest.mark.parametrize("tied", [True, False])
def test_presets_tune_and_guard_it(tiny: Any, tmp_path: Path, name: str, tied: bool) -> None:
    steps = () if name == "trit-2-blockwise" else ("corrections=[{kind: scale-tuning, steps: 4, checks: 1}]",)
    source = tiny("llama", tie_word_embeddings=tied, tokenizer=True)
    result = compress(source, name, tmp_path / "out", changes=(*SHORT, *steps), threads=1)
    outside = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert [r["name"] for r in result.layers if r["block"] is None] == outside
    assert not [r for r in result.layers if r["block"] is None and "fallback" in r]
    again = compress(source, name, tmp_path / "out", changes=(*SHORT, *steps), threads=1)
    assert again.already_complete


def test_a_tied_matrix_is_rounded_as_the_head_asks(tiny: Any, tmp_path: Path) -> None:
    """It is the head's products that see an error; the rows of an embedding of its own are looked up, and nothing
    runs through them, so that they are rounded to nearest."""
    grid = {"kind": "uniform", "bits": 3, "group_size": 16}
    asked = {"embedding": {"grid": grid}, "head": {"grid": grid, "rounding": {"kind": "hessian"}}}
    for tied in (True, False):
        source = tiny("llama", tie_word_embeddings=tied, tokenizer=True)
        result = compress(source, recipe_from({**PLAIN, **asked}, "here"), tmp_path / f"{tied}", changes=SHORT)
        outside = {r["name"]: r for r in result.layers if r["block"] is None}
        assert list(outside) == (["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"])
        head = outside["model.embed_tokens" if tied else "lm_head"]
        assert head["held_out_error"] < head["held_out_error_data_free"]
        assert tied or "sweep_loss" not in outside["model.embed_tokens"]
        assert not any("fallback" in record for record in outside.values())


def test_what_the_model_has_not(tiny: Any, tmp_path: Path) -> None:
    apart = recipe_from({**PLAIN, "embedding": SIX, "head": "same"}, "here")
    with pytest.raises(RecipeError, match="asks for different things in embedding and head, but this model has one"):
        compress(tiny("llama", tie_word_embeddings=True), apart, tmp_path / "tied")
    assert compress(tiny("llama"), apart, tmp_path / "apart").bits_per_weight_outside is not None
    with pytest.raises(RecipeError, match="encoder and decoder of this model share: set embedding and head to keep"):
        compress(tiny("t5"), recipe_from(BOTH, "here"), tmp_path / "t5")
    rotated = load_recipe("quarot-gptq", ("embedding=same",))
    with pytest.raises(RecipeError, match="transform rotation makes two matrices of model.embed_tokens"):
        compress(tiny("llama", tie_word_embeddings=True, tokenizer=True), rotated, tmp_path / "rotated")
    assert {path.name for path in tmp_path.iterdir()} == {"apart", "apart.log.jsonl"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sane", "field head is 'sane', but must be keep, same, 6bit"),
        ({"grid": {}, "bits": 6}, "there is no field head.bits"),
        ({"grid": {"kind": "unifrom"}}, "unifrom"),
        ({"grid": {"kind": "uniform", "bits": 99}}, "field head.grid.bits is 99"),
        ({"grid": {"kind": "uniform"}, "rounding": {"kind": "discquant"}}, "chooses the codes of a whole model"),
        ("9bit", "field head is '9bit', but must be keep"),
        (7, "field head is 7, but must be keep"),
    ],
)
def test_recipes_that_are_wrong(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from({**PLAIN, "head": value}, "here")


def test_a_recipe_is_written_down_and_read_again() -> None:
    recipe = recipe_from(BOTH, "here")
    assert recipe_from(recipe.dump(), "there") == recipe
    assert load_recipe("gptq").dump().keys().isdisjoint({"embedding", "head"})  # papers keep them
    assert recipe.digest() != recipe_from(PLAIN, "here").digest()
    short = recipe_from({**PLAIN, "head": "6bit"}, "here")
    assert short == recipe_from({**PLAIN, "head": {"grid": {"kind": "uniform", "bits": 6, "group_size": 128}}}, "here")


def test_rotated_where_it_is_not_tied(tiny: Any, tmp_path: Path) -> None:
    """The codes are those of the rotated matrices."""
    source = tiny("llama", tie_word_embeddings=False, tokenizer=True, dtype=torch.float32)
    fine = "{grid: {kind: uniform, bits: 8, group_size: 16}}"
    changes = (*SHORT, f"embedding={fine}", f"head={fine}", "grid.bits=8", "grid.group_size=16")
    out = compress(source, "quarot-gptq", tmp_path / "out", changes=changes, threads=1).out
    ids = torch.arange(3, 43).view(2, 20)
    model, _ = featherweight.load(out, dtype="float32")
    original, _ = featherweight.load(source, dtype="float32")
    found, wanted = logits_of(model, ids), logits_of(original, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
