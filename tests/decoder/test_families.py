"""Every family against transformers: the same logits, for prompts of several pages and every way of splitting them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import V5, make_model, reference_logits, relative, some_tokens

from featherweight.model.decoder.model import NativeModel

EXACT = 1e-3
"""Relative difference of logits with float activations: what keys and values in half precision leave."""

EXACT_ROW = 3e-3
"""The same of one row, where the difference does not average out."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, no groups": ("llama", {"num_key_value_heads": 4}),
    "llama, groups of three": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama, odd sizes": ("llama", {"hidden_size": 60, "head_dim": 10, "intermediate_size": 101, "vocab_size": 251}),
    "llama, wide heads": ("llama", {"head_dim": 80}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window 7": ("mistral", {"sliding_window": 7}),
    "mistral, window over pages": ("mistral", {"sliding_window": 140}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows above": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_transformers(case: str, tmp_path: Path) -> None:
    if not V5 and "windows above" in case:
        pytest.skip("transformers 4 gives all layers the window")
    family, settings = CASES[case]
    folder = make_model(family, tmp_path / "model", max_position_embeddings=512, **settings)
    tokens = some_tokens(300, settings.get("vocab_size", 256))
    expected = reference_logits(folder, tokens)
    model = NativeModel.open(folder, threads=2, precision="float")
    assert relative(model.forward(tokens), expected) < EXACT
    # One by one, and in pieces, the same comes out.
    model.reset()
    found = model.feed(tokens[:290])
    assert relative(found, expected[289]) < EXACT_ROW
    for place in range(290, 300):
        assert relative(model.feed([tokens[place]]), expected[place]) < EXACT_ROW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_uncompressed_weights_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, dtype)
    tokens = some_tokens(40)
    for precision in ("float", "int8"):
        found = NativeModel.open(folder, threads=1, precision=precision).forward(tokens)
        assert relative(found, reference_logits(folder, tokens)) < (EXACT if precision == "float" else 0.02)


def test_prompts_longer_than_a_chunk(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, max_position_embeddings=2048, num_hidden_layers=1)
    tokens = some_tokens(1100)
    expected = reference_logits(folder, tokens)
    model = NativeModel.open(folder, threads=2, precision="float")
    assert relative(model.forward(tokens), expected) < EXACT
    model.reset()
    assert relative(model.feed(tokens), expected[-1]) < EXACT_ROW


def test_a_window_that_is_ignored_is_noticed(tmp_path: Path) -> None:
    """The test above could not fail if windows made no difference."""
    tokens = some_tokens(60)
    narrow = make_model("mistral", tmp_path / "narrow", sliding_window=7)
    wide = make_model("mistral", tmp_path / "wide", sliding_window=None)
    assert relative(reference_logits(narrow, tokens), reference_logits(wide, tokens)) > 0.1
