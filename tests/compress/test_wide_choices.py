"""Choices that see a block or the whole model, through the whole line: compressed, stored, loaded, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight.integrations.transformers  # noqa: F401  # teaches transformers the format
from featherweight.compress.engine import compress
from featherweight.quantize.recipe import load_recipe, recipe_from
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


def test_biases_and_absorbed_scales_are_loaded(source: Path, tmp_path: Path) -> None:
    compress(source, load_recipe("d2quant", CHANGES), tmp_path / "out", threads=1)
    block = loaded(tmp_path / "out").model.layers[1]
    assert float(block.mlp.gate_proj.bias.abs().max()) > 0
    assert block.mlp.down_proj.bias is None
    assert block.mlp.down_proj.spec["kind"] == "binary-planes"


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
