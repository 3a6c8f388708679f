"""Rotations as wide as a layer: widths without a Hadamard matrix through a saved folder, loading and the decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import make_model, reference_logits, relative, some_tokens
from safetensors.torch import load_file

from featherweight import compress, load
from featherweight.methods.recipe import recipe_from
from featherweight.model.decoder.model import NativeModel
from featherweight.model.layers.modules import FeatherLinear

WIDTHS = {
    "72": {"hidden_size": 72, "intermediate_size": 200, "head_dim": 36},
    "288": {"hidden_size": 288, "intermediate_size": 344, "head_dim": 48},  # 344 = 8 x 43
    "odd": {"hidden_size": 66, "intermediate_size": 63, "head_dim": 22},
}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
GRIDS: dict[str, dict[str, Any]] = {
    "uniform": {"kind": "uniform", "bits": 4, "group_size": 24},
    "trit-planes": {"kind": "trit-planes", "group_size": 36},
}


@pytest.fixture(scope="module", params=[(width, grid) for width in WIDTHS for grid in GRIDS], ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    width, grid = request.param
    place = tmp_path_factory.mktemp("rotated")
    source = make_model("llama", place / "source", torch.float32, **WIDTHS[width], **HEADS)
    fields = {"name": "mine", "grid": GRIDS[grid], "transforms": [{"kind": "hadamard", "block": "whole"}]}
    compress(source, recipe_from(fields, "mine"), place / "made", threads=1)
    return source, place / "made"


def test_the_whole_width_is_one_block(folder: tuple[Path, Path]) -> None:
    stored = json.loads((folder[1] / "config.json").read_text())["quantization_config"]["codes"]
    blocks = {(modules[1], entry["code"]["block"]) for entry in stored for modules in entry["modules"].values()}
    assert blocks
    assert all(columns == block for columns, block in blocks)


def test_what_is_loaded_is_near_the_source(folder: tuple[Path, Path]) -> None:
    source, made = folder
    original = load_file(source / "model.safetensors")
    model, _ = load(made, dtype="float32")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FeatherLinear)}
    assert len(layers) >= 7
    for name, layer in layers.items():
        assert 0.01 < relative(layer.weight, original[f"{name}.weight"]) < 0.3


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_the_decoder_computes_what_transformers_does(folder: tuple[Path, Path], precision: str) -> None:
    tokens = some_tokens(60)
    model = NativeModel.open(folder[1], threads=2, precision=precision)
    expected = reference_logits(folder[1], tokens)
    assert relative(model.forward(tokens), expected) < (2e-4 if precision == "float" else 0.08)
