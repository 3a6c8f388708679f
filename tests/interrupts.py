"""Programs that are interrupted from the keyboard: a real SIGINT, also where the tests run with the signal ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import featherweight

READY = "ready\n"


@dataclass(frozen=True)
class Interrupted:
    code: int
    output: str
    errors: str
    seconds: float  # from the signal to the end


def restore_signal() -> None:
    """In a child: react to Ctrl-C. A shell starts what it runs in the background with the signal ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command: list[str]) -> subprocess.Popen[str]:
    source = str(Path(featherweight.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=restore_signal,
    )  # fmt: skip


def interrupt(process: subprocess.Popen[str], wait: float, most: float = 60) -> Interrupted:
    """Send the signal `wait` seconds from now, and see how the process ends."""
    time.sleep(wait)
    begun = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate(timeout=most)
    finally:
        process.kill()
    return Interrupted(process.returncode, output, errors, time.perf_counter() - begun)


def interrupt_program(program: str, *arguments: object, wait: float = 0.2) -> Interrupted:
    """Run a Python program until it has printed READY, and interrupt it `wait` seconds later."""
    process = start([sys.executable, "-c", program, *map(str, arguments)])
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == READY, line + process.communicate()[1]
    return interrupt(process, wait)
