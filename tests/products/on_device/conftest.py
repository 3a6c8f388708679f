"""Triton's kernels on the GPU where there is one, elsewhere in Triton's interpreter, on the CPU.

The interpreter is chosen when Triton is first imported, so the variable is set before anything here imports it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from interpreting import patched_once

from featherweight.model.products.triton import available

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

if not available():
    REASON = "Triton is not installed"
elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    REASON = "something imported Triton before these tests could choose its interpreter, and there is no GPU"
else:
    REASON = ""


@pytest.fixture(scope="session")
def device() -> torch.device:
    if REASON:
        pytest.skip(REASON)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    if REASON or torch.cuda.is_available():
        yield
        return
    with patched_once():
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
