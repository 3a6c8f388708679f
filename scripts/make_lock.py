#!/usr/bin/env python
"""Write requirements.lock: exact versions of everything, for every supported Python, from pyproject's ranges.

Uses `uv pip compile --universal`. torch is pinned without its platform's GPU packages, which pip adds itself where the
torch build that it picks asks for them: so the lock serves CPU and GPU builds alike.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "2.13.0"
HEAD = f"""\
# Exact versions for a reproducible set-up on Python 3.10 and later. Made by scripts/make_lock.py (make lock).
# torch's own GPU packages are left out: pip adds those of the build it picks.
torch=={TORCH}
"""
LEFT_OUT = ("torch", "nvidia-", "triton", "cuda-")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    command = [
        "uv",
        "pip",
        "compile",
        "--universal",
        "--python-version",
        "3.10",
        "--extra",
        "dev",
        "--extra",
        "encoder",
    ]
    command += ["--no-header", "--no-annotate", "--quiet", "--constraint", "-", "pyproject.toml"]
    found = subprocess.run(command, cwd=root, input=f"torch=={TORCH}\n", capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    lines = [line for line in found.stdout.splitlines() if line and not line.startswith(LEFT_OUT)]
    (root / "requirements.lock").write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
