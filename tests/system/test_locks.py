"""Locks between real processes: one holds it, and whoever ends lets go of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from featherweight.errors import OutputError
from featherweight.system.locks import FileLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")

HOLD = """
import subprocess, sys, time
from pathlib import Path
from featherweight.system.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
if sys.argv[2] == "with a child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=(lock.fileno(),))
    print(child.pid, flush=True)
else:
    print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def hold(path: Path, how: str, processes: list[subprocess.Popen[str]]) -> tuple[subprocess.Popen[str], str]:
    """A process that holds the lock, and what it said."""
    command = [sys.executable, "-c", HOLD, str(path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes.append(process)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_killed_process_lets_go(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    process, _ = hold(path, "alone", processes)
    lock = FileLock(path)
    assert not lock.acquire()
    process.send_signal(signal.SIGKILL)
    assert lock.acquire(wait=True)
    assert lock.enforced
    assert lock.acquire(), "it is held already"


def test_a_child_that_was_given_it_holds_it_on(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    process, said = hold(path, "with a child", processes)
    process.kill()
    process.wait()
    lock = FileLock(path)
    try:
        assert not lock.acquire()
    finally:
        os.kill(int(said), signal.SIGKILL)
    assert lock.acquire(wait=True)


def test_the_end_of_a_block_lets_go(path: Path) -> None:
    with FileLock(path) as first:
        assert first.acquire()
        assert not FileLock(path).acquire()
        assert first.fileno() > 2
    with pytest.raises(ValueError, match="is not held"):
        first.fileno()
    assert FileLock(path).acquire()
    assert path.read_bytes() == b""


def test_the_lock_of_a_removed_file_counts_for_nothing(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    path.unlink()
    assert second.acquire()
    assert not FileLock(path).acquire(), "the file that is there now is locked"


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        FileLock(tmp_path / "a" / "lock").acquire()
    assert FileLock(tmp_path / "a" / "b" / "lock", make_folder=True).acquire()
