"""PyTorch's threads sleep while they wait, unless somebody has decided otherwise or it is too late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight

PROGRAM = "{before}\nimport os, featherweight\nprint(os.environ.get('OMP_WAIT_POLICY'))"


def policy(before: str = "", **set_: str) -> str:
    source = str(Path(featherweight.__file__).parents[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env=kept | {"PYTHONPATH": source} | set_, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("set_", "expected"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "1000"}, "None"),
        ({"KMP_BLOCKTIME": "0"}, "None"),
    ],
    ids=["nobody", "the policy", "libgomp", "Intel's"],
)
def test_who_decides(set_: dict[str, str], expected: str) -> None:
    assert policy(**set_) == expected


def test_too_late() -> None:
    assert policy("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == "None"
