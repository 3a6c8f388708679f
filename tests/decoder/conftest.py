"""The native library must be there; torch runs on one thread."""

from __future__ import annotations

import pytest
import torch

from featherweight.model.decoder import native
from featherweight.model.decoder.architectures import UnsupportedModelError


@pytest.fixture(autouse=True)
def native_library() -> None:
    torch.set_num_threads(1)
    try:
        native.functions()
    except UnsupportedModelError as error:
        pytest.skip(str(error))
