"""Running the command `feather` in a process of its own, or, many times faster, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import featherweight


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    errors: str

    def sentence(self) -> str:
        """The one line on standard error that says what is wrong; fails if there is more, or a traceback."""
        assert self.code == 1, self
        lines = self.errors.splitlines()
        assert len(lines) == 1, self.errors
        assert lines[0].startswith("error: ")
        return lines[0]

    def last_sentence(self) -> str:
        """The same where progress was shown before."""
        assert self.code == 1, self
        lines = self.errors.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1, self.errors
        assert "Traceback" not in self.errors
        assert lines[-1].startswith("error: ")
        return lines[-1]


def feather(*arguments: Any, timeout: float = 240) -> Outcome:
    """`feather ARGUMENTS` in a process of its own, its output not a terminal."""
    source = str(Path(featherweight.__file__).parents[1])
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    environment = kept | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "featherweight.cli.main", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, stdin=subprocess.DEVNULL
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def feather_here(*arguments: Any) -> Outcome:
    """`feather ARGUMENTS` by a call of its entry point; what is no deliberate error comes through as an exception."""
    from featherweight.cli.main import main

    output, errors = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, output.getvalue(), errors.getvalue())
