"""The kernels compile for GPUs: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language", reason="Triton is not installed")


LONG = pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "cases"),
    [pytest.param(80, "whole", marks=LONG), pytest.param(90, "whole", marks=LONG), (90, "slice")],
)
def test_kernels_compile(capability: int, cases: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "ahead.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), str(capability), cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {
        "matvec_kernel",
        "matvec_int8_kernel",
        "tiles_kernel",
        "group_tiles_kernel",
        "epilogue_kernel",
        "hadamard_kernel",
        "quantize_kernel",
    }
