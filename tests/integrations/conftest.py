"""Compressed folders for the tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_folders import Folder, build


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folder]:
    """Compressed folder of a model, made once; tests must not change it."""
    made: dict[str, Folder] = {}

    def get(name: str) -> Folder:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def fresh_llama(tmp_path: Path) -> Folder:
    """A compressed llama that a test may damage."""
    return build("llama", tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
