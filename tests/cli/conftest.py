"""Tiny models and one small output; tests that change something work on copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from feather_command import Outcome, feather

from models import make_tiny


@pytest.fixture(autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands remember between runs is not that of whoever runs the tests, nor is the width of their lines."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "model", tokenizer=True)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("bert", tmp_path_factory.mktemp("bert") / "model", tokenizer=True)


@pytest.fixture(scope="session")
def compressed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama, by the command as written."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    made: Outcome = feather("compress", llama, "--recipe", "ptqtp", "--out", out)
    assert made.code == 0, made.errors
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 12)
    return path
