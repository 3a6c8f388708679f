"""Ctrl-C in the command: it ends at once, with 130 and without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight
from featherweight.cli import interrupts as interrupts_of_command
from interrupts import Interrupted, interrupt, interrupt_program, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
SOON = 3.0
"""Seconds; undisturbed, the commands take many times as long."""


def ends(done: Interrupted) -> None:
    assert done.code == 130, done
    assert "Traceback" not in done.errors
    assert "ignored" not in done.errors
    assert done.errors.splitlines()[-1].startswith("interrupted")
    assert done.seconds < SOON


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_generation(engine: str) -> None:
    options = ["--prompt", "She said", "--max-tokens", "2000", "--temperature", "1.5", "--engine", engine]
    process = start([sys.executable, "-m", "featherweight.cli.main", "generate", str(REFERENCE), *options])
    assert process.stdout is not None
    assert process.stdout.read(12).startswith("She said")
    ends(interrupt(process, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "compress"])
def test_commands(command: str, tmp_path: Path) -> None:
    arguments = {
        "eval": [str(REFERENCE), "--dtype", "float32"],
        "compress": [str(REFERENCE), "--recipe", "gptq", "--out", str(tmp_path / "out")],
    }[command]
    program = (  # the signal comes while the command is at work, whatever loading torch took
        "import torch, transformers, featherweight.cli.commands\n"
        "from featherweight.cli.main import main\n"
        "print('ready', flush=True)\n"
        "main()\n"
    )
    done = interrupt_program(program, command, *arguments, wait=1.0)
    ends(done)


STUCK = """
import time
from featherweight.cli.interrupts import Interrupts
with Interrupts("interrupted"):
    print("ready", flush=True)
    {work}
    print("went on", flush=True)
"""


@pytest.mark.parametrize(
    "work",
    [
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
        "try: time.sleep(60)\n    except KeyboardInterrupt: pass\n    time.sleep(60)",
    ],
    ids=["in C", "swallowed"],
)
def test_whatever_it_is_doing(work: str) -> None:
    done = interrupt_program(STUCK.format(work=work), wait=0.2)
    assert done.code == 130, done
    assert done.errors == "interrupted\n"
    assert "went on" not in done.output
    assert done.seconds < SOON


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup feather ... &`: what a shell has started in the background of a script is not for the keyboard."""
    program = (
        "import os, signal\n"
        "from featherweight.cli.interrupts import Interrupts\n"
        "with Interrupts('interrupted'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_the_handler_is_put_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_of_command.Interrupts("interrupted"):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            assert interrupts_of_command.current.get() is not None
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert interrupts_of_command.current.get() is None
    finally:
        signal.signal(signal.SIGINT, before)
