"""Several processes share one run: the same bytes, and any of them may be killed at any moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import FeatherError, OutputError
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.system.locks import FileLock
from featherweight.tasks.compress import compression
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.workers import Order, share_of
from outputs import Stop, assert_only_output, contents, die, in_process, log_events

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")

OPTIONS: dict[str, Any] = {"recipe": "ptqtp", "shard_bytes": 60_000, "threads": 1}
LAYERS = 14


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of one process alone."""
    out = tmp_path_factory.mktemp("alone") / "out"
    compress(llama, out=out, **OPTIONS)
    return contents(out)


def wait_for_layers(out: Path, count: int) -> None:
    """Until so many layers are finished."""
    folder = out.with_name(out.name + RUN_SUFFIX) / "artifacts"
    end = time.monotonic() + 120
    while len(list(folder.glob("layer-*.safetensors"))) < count:
        assert time.monotonic() < end, "the worker does nothing"
        time.sleep(0.01)


class Watch:
    """Holds the run's own process at its first layer until a worker has finished some."""

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.workers: list[int] = []
        self.notes: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "workers":
            self.workers = event["processes"]
        elif event["event"] == "note":
            self.notes.append(event["text"])
        elif event["event"] == "layer" and event["number"] == 1:
            wait_for_layers(self.out, self.count)
            self.met()

    def met(self) -> None:
        pass


def test_a_worker_does_layers_and_the_bytes_are_the_same(
    llama: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    watch = Watch(out, LAYERS)  # while this process does nothing the worker does all but the first
    result = compress(llama, out=out, workers=2, observer=watch, **OPTIONS)
    assert_only_output(out, expected)
    assert len(watch.workers) == 1
    assert watch.notes == []
    assert result.resumed == 0
    assert sorted(e["number"] for e in log_events(out) if e["event"] == "layer") == list(range(1, LAYERS + 1))
    with pytest.raises(ProcessLookupError):
        os.kill(watch.workers[0], 0)
    assert compress(llama, out=out, workers=3, **OPTIONS).already_complete


def test_a_worker_that_is_killed_is_done_without(llama: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    class Killing(Watch):
        def met(self) -> None:
            os.kill(self.workers[0], signal.SIGKILL)
            os.waitid(os.P_PID, self.workers[0], os.WEXITED | os.WNOWAIT)

    out = tmp_path / "out"
    watch = Killing(out, 4)
    compress(llama, out=out, workers=2, observer=watch, **OPTIONS)
    assert_only_output(out, expected)
    assert watch.notes == ["a worker ended early (it was ended); the others did its layers"]


def test_a_run_that_stops_sees_its_worker_off(llama: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    class Stopping(Watch):
        def met(self) -> None:
            raise Stop

    out = tmp_path / "out"
    watch = Stopping(out, 4)
    with pytest.raises(Stop):
        compress(llama, out=out, workers=2, observer=watch, **OPTIONS)
    with pytest.raises(ProcessLookupError):
        os.kill(watch.workers[0], 0)
    assert compress(llama, out=out, **OPTIONS).resumed >= 4
    assert_only_output(out, expected)


def stop_the_worker_and_die(model: str, out: str) -> None:
    """Target of a process: its worker stands still when it is killed, and so cannot see that it is alone."""

    class Dying(Watch):
        def met(self) -> None:
            os.kill(self.workers[0], signal.SIGSTOP)
            die()

    compress(model, out=out, workers=2, observer=Dying(Path(out), 4), **OPTIONS)


def test_the_run_that_is_killed_takes_its_worker_with_it(
    llama: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Until that has ended another command is refused; then it goes on, and what the worker did counts."""
    out = tmp_path / "out"
    assert in_process(stop_the_worker_and_die, str(llama), str(out)) == -signal.SIGKILL
    worker = next(event["processes"][0] for event in log_events(out) if event["event"] == "workers")
    for options in ({}, {"recipe": "rtn-4", "overwrite": True}):
        with pytest.raises(OutputError, match="another process is working in"):
            compress(llama, out=out, **(OPTIONS | options))
    os.kill(worker, signal.SIGCONT)
    with FileLock(out.with_name(out.name + RUN_SUFFIX) / "lock") as lock:
        assert lock.acquire(wait=True)
    assert compress(llama, out=out, workers=2, **OPTIONS).resumed >= 4
    assert_only_output(out, expected)


def nothing_to_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "missing"))


def something_else(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")


def another_run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def order(*arguments: Any) -> Order:
        return Order(*arguments[:-1], {**arguments[-1], "seed": 1})

    monkeypatch.setattr(compression, "Order", order)


FAULTS = {
    nothing_to_start: "a worker cannot be started (No such file or directory); the others do its layers",
    something_else: "a worker ended early (it was ended); the others did its layers",
    another_run: "changed while the work went on: run the command again); the others did its layers",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_cannot_work_is_done_without(
    llama: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    class Waiting(Watch):
        def met(self) -> None:
            for worker in self.workers:
                os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)

    out = tmp_path / "made" / "out"
    watch = Waiting(out, 1)
    fault(monkeypatch, tmp_path)
    compress(llama, out=out, workers=2, observer=watch, **OPTIONS)
    assert_only_output(out, expected)
    assert len(watch.notes) == 1
    assert watch.notes[0].endswith(FAULTS[fault])


def test_what_workers_are_refused_for(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatherError, match=r"recipe gptq runs the network.*leave --workers out"):
        compress(llama, "gptq", tmp_path / "out", workers=2)
    with pytest.raises(FeatherError, match="workers must be positive, not 0"):
        compress(llama, "rtn-4", tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_shared_out() -> None:
    assert [share_of(threads, workers) for threads, workers in ((8, 1), (8, 3), (1, 4), (None, 1))] == [8, 2, 1, None]
