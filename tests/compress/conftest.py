"""Tiny random checkpoints, written once a session; tests never change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from models import FAMILIES, make_tiny

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`tiny("llama", tie_word_embeddings=True)`: the folder of a model, made at the first call with these settings."""
    made: dict[str, Path] = {}

    def make(family: str, **settings: Any) -> Path:
        key = repr((family, sorted(settings.items(), key=str)))
        if key not in made:
            if not hasattr(transformers, FAMILIES[family][0]):
                pytest.skip(f"transformers {transformers.__version__} does not know {family}")
            made[key] = make_tiny(family, tmp_path_factory.mktemp(family.replace("-", "_")) / "model", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(tiny: MakeModel) -> Path:
    """Two blocks in one shard, head not tied, with a byte tokenizer."""
    return tiny("llama", tokenizer=True)
