"""Layers whose queries, keys and values read their input in different layouts: the decoder against the decoded model.

In the last layer of a prompt the decoder asks for keys and values of all tokens and for queries of the last one alone:
such layers share buffers in other constellations than the layers before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import make_model, reference_logits, relative, some_tokens

from featherweight import compress
from featherweight.model.decoder.model import NativeModel

NEAREST: dict[str, Any] = {"grid": {"kind": "uniform", "bits": 4, "group_size": 128}, "rounding": {"kind": "nearest"}}
ROUNDED = 0.06
"""Relative difference of logits with activations in 8 bits, see test_compressed."""
EXACT = 1e-3
"""With activations as they are: keys and values are rounded to half precision, now and then to the other side."""

RECIPES: dict[str, dict[str, Any]] = {
    "narrow keys": {"overrides": [{"match": "k_proj", "grid": {"group_size": 32}}]},
    "narrow values": {"overrides": [{"match": "v_proj", "grid": {"group_size": 16}}]},
    "plain keys": {"layers": {"head": True, "skip": ["k_proj"]}},
    "three widths": {
        "grid": {"kind": "uniform", "bits": 2, "group_size": 32},
        "overrides": [
            {"match": "k_proj", "grid": {"bits": 3, "group_size": 16}},
            {"match": "v_proj", "grid": {"bits": 8, "group_size": 8}},
            {"match": "up_proj", "grid": {"bits": 5, "group_size": 64}},
        ],
    },
    "trits beside integers": {"overrides": [{"match": "v_proj", "grid": {"kind": "trit-planes", "group_size": 64}}]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("mixed") / "source", torch.bfloat16, hidden_size=128)


@pytest.mark.parametrize("name", RECIPES)
def test_mixed_layouts_give_the_logits_of_the_decoded_model(name: str, source: Path, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(NEAREST | RECIPES[name]))  # which is YAML, too
    compress(source, recipe, folder, threads=1)
    tokens = some_tokens(70)
    expected = reference_logits(folder, tokens)
    exact = NativeModel.open(folder, threads=2, precision="float")
    assert relative(exact.forward(tokens), expected) < EXACT
    for threads in (1, 2):
        model = NativeModel.open(folder, threads=threads, precision="int8")
        assert relative(model.feed(tokens), expected[-1]) < ROUNDED  # the last token alone: a pass that drops queries
        model.reset()
        assert relative(model.forward(tokens), expected) < ROUNDED
