from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from arranged_models import Made

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `models`


@pytest.fixture(autouse=True)
def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    root, known = tmp_path_factory.mktemp("geometry"), dict[str, Made]()

    def make(name: str) -> Made:
        if name not in known:
            known[name] = Made(name, root / name)
        return known[name]

    return make
