"""Shared settings of all tests: deterministic, few threads, no network."""

from __future__ import annotations

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Results are compared with oracles in float32: they shall not hang on what this processor multiplies fastest.
os.environ.setdefault("FEATHERWEIGHT_PRECISION", "float32")
if "PYTEST_XDIST_WORKER" in os.environ:  # each of several processes has one thread, where a test does not say otherwise
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # Triton asks when it is first imported, which parts of torch do
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SECONDS = float(os.environ.get("FEATHERWEIGHT_TEST_SECONDS", "inf"))
"""`make check` has so much time for tests; those that would begin later are skipped, and said to be."""
BEGUN = time.monotonic()


def pytest_runtest_setup() -> None:
    if time.monotonic() - BEGUN > SECONDS:
        pytest.skip(f"the {SECONDS:.0f} s of this check are over; `make test` runs every test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    # What takes longest begins first, so that several processes end together: real models, then files with slow tests.
    items.sort(key=lambda item: ("real" not in item.path.parts, item.path not in slow))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not `keywords`, which hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
