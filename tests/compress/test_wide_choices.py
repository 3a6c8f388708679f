"""Choices that see a block or the whole model, through the whole line: compressed, stored, loaded, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight.integrations.transformers  # noqa: F401  # teaches transformers the format
from featherweight.methods.recipe import load_recipe, recipe_from
from featherweight.model.decoder.network import network_of
from featherweight.model.decoder.weights import load_weights
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import compress
from models import make_tiny

CHANGES = ["calibration.sequences=16", "calibration.length=48"]
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("source"), torch.float32, tokenizer=True, **SHAPE)


def loaded(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)


def divergence(source: Path, folder: Path) -> float:
    ids = torch.arange(160).view(4, 40)
    with torch.no_grad():
        log_p, log_q = (loaded(place)(ids).logits.log_softmax(-1) for place in (source, folder))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("awq-3", []),
        ("flexround-fast", ["rounding.steps=20"]),
        ("adadim-gptq-3", []),
        ("discquant-fast", ["rounding.steps=16"]),
        ("quarot-gptq", []),
        ("d2quant-3", []),
    ],
)
def test_presets(preset: str, changes: list[str], source: Path, tmp_path: Path) -> None:
    done = compress(source, load_recipe(preset, [*CHANGES, *changes]), tmp_path / "out", threads=1)
    plain = compress(source, "rtn-2", tmp_path / "rtn-2", threads=1)
    assert len(done.layers) == len(plain.layers) == 14
    assert divergence(source, tmp_path / "out") < divergence(source, tmp_path / "rtn-2")


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("preset", ["quarot-gptq", "rsq"])
def test_rotated_experts(preset: str, family: str, tmp_path: Path) -> None:
    """A mixture of experts through rotation, sweep and storage; few tokens reach each expert."""
    shape = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    shape = shape if family == "qwen2-moe" else SHAPE
    source = make_tiny(family, tmp_path / "source", torch.float32, tokenizer=True, **shape)
    done = compress(source, load_recipe(preset, CHANGES), tmp_path / "out", threads=1)
    compress(source, "rtn-2", tmp_path / "rtn-2", threads=1)
    assert any(".experts." in layer["name"] for layer in done.layers)
    assert divergence(source, tmp_path / "out") < divergence(source, tmp_path / "rtn-2")
    assert verify(tmp_path / "out").whole


def test_biases_and_absorbed_scales_are_loaded(source: Path, tmp_path: Path) -> None:
    compress(source, load_recipe("d2quant", CHANGES), tmp_path / "out", threads=1)
    block = loaded(tmp_path / "out").model.layers[1]
    assert float(block.mlp.gate_proj.bias.abs().max()) > 0
    assert block.mlp.down_proj.bias is None
    assert block.mlp.down_proj.spec["kind"] == "binary-planes"


SHIFTED = {
    "name": "shifted",
    "grid": {"kind": "uniform", "bits": 2, "group_size": 32},
    "corrections": [{"kind": "mean-shift"}],
    "calibration": {"sequences": 16, "length": 48, "held_out": 0},  # without the comparison with data-free blocks
}


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_keeps_its_bias(tied: bool, tmp_path: Path) -> None:
    """In transformers, once saved again, in the base model, and in the native decoder."""
    import transformers

    shape: dict[str, Any] = SHAPE | {"tie_word_embeddings": tied}
    source = make_tiny("llama", tmp_path / "source", torch.float32, tokenizer=True, **shape)
    compress(source, recipe_from(SHIFTED, "shifted"), tmp_path / "out", threads=1)
    without = {**SHIFTED, "corrections": [{"kind": "mean-shift", "final": False}]}
    compress(source, recipe_from(without, "shifted"), tmp_path / "without", threads=1)
    model = loaded(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["biases"] == ["lm_head"]
    bias = model.lm_head.bias
    assert float(bias.abs().max()) > 0
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.allclose(logits - bias, loaded(tmp_path / "without")(ids).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert torch.equal(again.lm_head.bias, bias)
    assert again.lm_head.weight is again.model.embed_tokens.weight if tied else True
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert torch.isfinite(base(ids).last_hidden_state).all()
    assert verify(tmp_path / "out").whole
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        head = load_weights(checkpoint, network_of(checkpoint.config)).head
    assert head.bias is not None
    assert torch.equal(head.bias, bias)


@pytest.mark.parametrize("against", ["block", "model"])
def test_tuned_scales(against: str, source: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "tuned",
        "grid": {"kind": "trit-planes", "planes": 1},
        "corrections": [{"kind": "scale-tuning", "against": against, "steps": 24, "learning_rate": 0.01, "checks": 4}],
        "calibration": {"sequences": 48, "length": 48, "batch_tokens": 192},
    }
    told: list[dict[str, Any]] = []
    tuned = compress(source, recipe_from(recipe, "tuned"), tmp_path / "out", threads=1, observer=told.append)
    plain = compress(source, "ptqtp-1", tmp_path / "plain", threads=1)
    assert tuned.bits_per_weight == plain.bits_per_weight
    assert tuned.layers[0]["spec"] == plain.layers[0]["spec"]
    ends = [fact for fact in told if "held_out_after" in fact]
    assert len(ends) == (2 if against == "block" else 1)
    assert all(fact["held_out_after"] < fact["held_out_before"] for fact in ends)
