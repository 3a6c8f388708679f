"""Compressed models: the native decoder against transformers on the decoded weights, and on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_models import make_model, reference_logits, relative, some_tokens

import featherweight
from featherweight import compress, load
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.text import Tokenizer

REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
EXACT = 2e-4
"""Relative difference of logits with float activations, against keys and values rounded to half precision, too."""
HALF_CACHE = 1e-3
"""The same against a cache in float32."""
ROUNDED = 0.06
"""With activations in 8 bits: random networks of this size have no redundancy that would hide the rounding."""

PRESETS = ["rtn-4", "ptqtp"]
PROMPT = "The old man looked at the sea for a long time, and"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for family in ("llama", "qwen2", "qwen3"):
        place = tmp_path_factory.mktemp(family)
        source = make_model(family, place / "source", torch.bfloat16, hidden_size=128, max_position_embeddings=256)
        for preset in PRESETS:
            compress(source, preset, place / preset, threads=1)
            made[family, preset] = place / preset
    return made


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_same_logits_as_transformers(folders: dict[tuple[str, str], Path], family: str, preset: str) -> None:
    folder = folders[family, preset]
    tokens = some_tokens(140)
    expected = reference_logits(folder, tokens)
    assert relative(NativeModel.open(folder, threads=2, precision="float").forward(tokens), expected) < EXACT
    rounded = NativeModel.open(folder, threads=2, precision="int8").forward(tokens)
    assert relative(rounded, expected) < ROUNDED
    assert torch.cosine_similarity(rounded, expected, dim=1).mean() > 0.998


@pytest.fixture(scope="module", params=["plain", "rtn-4", "ptqtp"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled trained model, as it is or compressed."""
    if request.param == "plain":
        return REFERENCE
    out = tmp_path_factory.mktemp("real") / request.param
    compress(REFERENCE, request.param, out, threads=1)
    return out


def test_the_trained_model_writes_the_same(real: Path) -> None:
    model, tokenizer = load(real, dtype="float32", cache=True)
    prompt = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        made = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        expected = model(made).logits[0]
    ours = Tokenizer.open(real)
    assert ours is not None
    assert ours.encode(PROMPT) == prompt
    exact = NativeModel.open(real, threads=2, precision="float")
    assert exact.generate(prompt, 64) == made[0, len(prompt) :].tolist()
    assert relative(exact.forward(made[0].tolist()), expected) < HALF_CACHE
    rounded = NativeModel.open(real, threads=2, precision="int8").forward(made[0].tolist())
    assert torch.cosine_similarity(rounded, expected, dim=1).min() > 0.999
    agreement = (rounded.argmax(1) == expected.argmax(1)).float().mean()
    assert agreement > 0.95


def test_bytes_of_a_token_are_those_of_the_weights(real: Path) -> None:
    """Packed layers take about what the file does: padding and alignment only."""
    model = NativeModel.open(real, threads=1)
    stored = sum(file.stat().st_size for file in real.glob("*.safetensors"))
    assert 0.85 * stored < model.weights.bytes_per_token < 1.25 * stored
