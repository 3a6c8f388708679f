"""Further processes that take layers of a run without data: how they are started, and what they do.

    python -m featherweight.tasks.compress.workers     an order as a line of JSON on its standard input

A worker holds the lock of the run together with the process that started it: as long as one of them lives, another
command is refused. It ends with that process, however that ends: the other end of its standard input is closed then.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from featherweight.errors import CheckpointError, FeatherError, OutputError
from featherweight.events import Observer
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.model.network.source import open_source
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.storage.run.executor import take_part
from featherweight.storage.run.folder import RunFolder
from featherweight.system.places import PACKAGE
from featherweight.system.threads import thread_count, use_threads
from featherweight.tasks.compress.allocate import Measuring, decided
from featherweight.tasks.compress.data_free import layer_tasks
from featherweight.tasks.compress.identity import same_identity
from featherweight.tasks.compress.plan import make_plan

PATIENCE = 10.0  # seconds for a worker to end by itself when nothing is left to do


@dataclass(frozen=True)
class Order:
    """What a worker is told, JSON-able.

    model : folder, or file, that the run reads
    recipe : as `Recipe.dump` gives it
    threads, max_memory : of this process alone
    out, identity : of the run
    """

    model: str
    recipe: dict[str, Any]
    seed: int
    threads: int | None
    max_memory: int | None
    trust_remote_code: bool
    out: str
    identity: dict[str, Any]


class Workers:
    """Processes beside this one; a context manager. One that cannot be started, or ends early, is only noted.

    Parameters
    ----------
    run : RunFolder
        Its lock is held by this process.
    order : Order
        What each of them is told.
    count : int
        How many there are beside this process.
    notify : Observer
        Hears of those that fail.
    """

    def __init__(self, run: RunFolder, order: Order, count: int, notify: Observer) -> None:
        self.run, self.order, self.count, self.notify = run, order, count, notify
        self._started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def __enter__(self) -> Workers:
        if not self.run.lock.enforced:
            raise OutputError(
                f"the file system of {self.run.path} has no locks, which processes that share a run need; leave "
                "--workers out"
            )
        try:
            for _ in range(self.count):
                self._start()
        except BaseException:
            self._end()
            raise
        self.notify({"event": "workers", "processes": [process.pid for process, _ in self._started]})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = [self._last_words(log) for process, log in self._started if process.poll()]
        self._end()
        for reason in failed if kind is None else ():
            self._note(f"a worker ended early ({reason}); the others did its layers")

    def _start(self) -> None:
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        log = tempfile.TemporaryFile()  # noqa: SIM115  (it is closed when the worker has ended)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "featherweight.tasks.compress.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(self.run.lock.fileno(),),
                start_new_session=True,  # Ctrl-C is for the process that was called
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError as error:
            log.close()
            self._note(f"a worker cannot be started ({error.strerror or error}); the others do its layers")
            return
        self._started.append((process, log))
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already, which is noted later
            process.stdin.write(json.dumps(self.order.__dict__).encode() + b"\n")
            process.stdin.flush()

    def _end(self) -> None:
        for process, _ in self._started:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process, log in self._started:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
        self._started.clear()

    def _last_words(self, log: IO[bytes]) -> str:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it was ended"

    def _note(self, text: str) -> None:
        self.notify({"event": "note", "text": text})


def check_workers(recipe: Recipe, workers: int, device: torch.device) -> None:
    """FeatherError for a number that is none, for recipes whose layers depend on each other, and off the CPU."""
    if workers < 1:
        raise FeatherError(f"workers must be positive, not {workers}")
    if workers > 1 and recipe.calibrated:
        raise FeatherError(
            f"recipe {recipe.name} runs the network, whose layers are solved one after the other, so processes cannot "
            "share them; leave --workers out"
        )
    if workers > 1 and device.type != "cpu":
        raise FeatherError(f"workers share the processors, and layers are solved on {device}; leave --workers out")


def share_of(threads: int | None, workers: int) -> int | None:
    """Threads of each process; those of all together are what was asked for, or the default."""
    return threads if workers == 1 else max(1, thread_count(threads) // workers)


def work(order: Order) -> int:
    """Take layers of a run until there are none to be taken; how many were done here.

    Raises
    ------
    FeatherError
        Whatever keeps a layer from being solved. CheckpointError also if model or run are no longer those of the order.
    """
    run = RunFolder(Path(order.out))
    with open_source(order.model, order.trust_remote_code) as checkpoint, use_threads(order.threads):
        read = {"source": checkpoint.identity(), "weights": sample_digest(checkpoint)}
        if not same_identity(run.identity(), order.identity) or read != {name: order.identity[name] for name in read}:
            raise CheckpointError(f"{order.model} or {run.path} changed while the work went on: run the command again")
        plan = make_plan(checkpoint, recipe_from(order.recipe, "of a run"), order.threads, order.max_memory)
        plan = decided(plan, checkpoint, run, Measuring(order.seed))
        return take_part(layer_tasks(plan, checkpoint, run, order.seed), run.claims)


def _end_with_starter() -> None:
    os.read(0, 1)  # nothing is ever sent: it returns when the other end is closed
    os._exit(0)


def main() -> None:
    """A worker process."""
    order = Order(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_starter, daemon=True).start()
    try:
        work(order)
    except FeatherError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
