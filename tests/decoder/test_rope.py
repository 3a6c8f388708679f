"""Rotary positions: the frequencies of transformers, and its logits within and beyond the original context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import V5, make_model, reference_logits, relative, some_tokens, transformers

from featherweight.errors import CheckpointError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.rope import rope_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with settings": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


def config_of(settings: dict[str, Any] | None, theta: float, **others: Any) -> Any:
    common = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, **others}
    if V5:
        return transformers.LlamaConfig(**common, rope_parameters={**(settings or {}), "rope_theta": theta})
    return transformers.LlamaConfig(**common, rope_scaling=settings, rope_theta=theta)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_frequencies_are_those_of_transformers(kind: str | None, theta: float) -> None:
    settings = None if kind is None else dict(KINDS[kind])
    config = config_of(settings, theta)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config=config)
    for written in (
        {"rope_scaling": settings, "rope_theta": theta},
        {"rope_parameters": {"rope_type": "default", **(settings or {}), "rope_theta": theta}},
    ):
        rope = rope_of(written, 16, 512)
        torch.testing.assert_close(rope.frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
        assert rope.scale == pytest.approx(rotary.attention_scaling, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str, tmp_path: Path) -> None:
    key = "rope_parameters" if V5 else "rope_scaling"
    settings = {**KINDS[kind], **({"rope_theta": 10000.0} if V5 else {})}
    folder = make_model("llama", tmp_path, max_position_embeddings=512, **{key: settings})
    tokens = some_tokens(200)
    model = NativeModel.open(folder, threads=1, precision="float")
    assert relative(model.forward(tokens), reference_logits(folder, tokens)) < 1e-3


def test_dynamic_scaling_beyond_the_original_length(tmp_path: Path) -> None:
    key = "rope_parameters" if V5 else "rope_scaling"
    settings = {**KINDS["dynamic"], **({"rope_theta": 10000.0} if V5 else {})}
    folder = make_model("llama", tmp_path, max_position_embeddings=64, **{key: settings})
    tokens = some_tokens(150)
    model = NativeModel.open(folder, threads=1, precision="float", context=256)
    expected = reference_logits(folder, tokens)
    assert relative(model.forward(tokens), expected) < 1e-3
    # A prompt that shares its beginning with a longer one is computed anew: its keys depend on its length.
    model.reset()
    model.generate(tokens, 1, stops=())
    model.generate(tokens[:100], 1, stops=())
    assert model.stats().reused_tokens == 0
    plain = NativeModel.open(make_model("llama", tmp_path / "plain", max_position_embeddings=256), threads=1)
    assert relative(plain.forward(tokens), expected) > 0.05


def test_growing_beyond_the_original_length_token_by_token(tmp_path: Path) -> None:
    key = "rope_parameters" if V5 else "rope_scaling"
    settings = {**KINDS["dynamic"], **({"rope_theta": 10000.0} if V5 else {})}
    folder = make_model("llama", tmp_path, max_position_embeddings=64, **{key: settings})
    tokens = some_tokens(80)
    expected = reference_logits(folder, tokens, chunks=1)
    model = NativeModel.open(folder, threads=1, precision="float", context=128)
    found = torch.stack([model.feed([token]) for token in tokens])
    assert relative(found, expected) < 1e-3


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, UnsupportedModelError, "longrope"),
        ({"rope_type": "linear"}, CheckpointError, "factor"),
        ({"rope_type": "linear", "factor": "much"}, UnsupportedModelError, "where a number is expected"),
        ({"rope_type": "linear", "factor": 0}, CheckpointError, "make no sense"),
        ({"full_attention": {"rope_type": "default"}}, UnsupportedModelError, "layers differ"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "whole heads"),
        ("linear", CheckpointError, "not an object"),
    ],
)
def test_settings_that_cannot_be(settings: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        rope_of(json.loads(json.dumps({"rope_scaling": settings})), 16, 512)
