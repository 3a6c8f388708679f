"""What tests of runs share: reading folders, stopping runs, running them in processes that die."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Observer = Callable[[dict[str, Any]], None]


RECORD = "featherweight-run.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path; of the record, which has times in it, the names of its facts."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): _content(path) for path in files}


def _content(path: Path) -> bytes:
    if path.name != RECORD:
        return path.read_bytes()
    record = json.loads(path.read_bytes())
    return json.dumps({**record, "compression": sorted(record["compression"])}).encode()


def log_events(out: Path) -> list[dict[str, Any]]:
    """OUT.log.jsonl; fails where a line is not JSON."""
    path = out.with_name(out.name + ".log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_only_output(out: Path, expected: dict[str, bytes]) -> None:
    """OUT holds these bytes and nothing else, and beside it stands its log and nothing else."""
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert {path.name for path in out.parent.iterdir()} <= {out.name, out.name + ".log.jsonl"}
    log_events(out)


class Stop(Exception):
    """Raised by `stopping` to end a run."""


def stopping(kind: str, number: int = 1) -> Observer:
    """An observer that ends the run at the `number`-th event of a kind."""
    seen = 0

    def observe(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == kind
        if seen == number and event["event"] == kind:
            raise Stop

    return observe


def in_process(target: Callable[..., None], *arguments: Any) -> int:
    """Run in a process of its own and return its exit code; -9 where it was killed."""
    process = start(target, *arguments)
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


LOADED = (
    "featherweight.tasks.compress.compression",
    "featherweight.tasks.compress.calibrated",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",  # which optimisers import
)
"""What runs import sooner or later: once, for all processes that `start` makes."""


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Start in a process forked from one that has loaded what runs need and never computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LOADED))
    process = context.Process(target=_guarded, args=(target, *arguments))
    process.start()
    return process


def _guarded(target: Callable[..., None], *arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def dying_at_file_operation(near: str, number: int | None, counted: Path | None = None) -> Iterator[None]:
    """Kill this process before its `number`-th operation on a file whose path contains `near`.

    Opening for writing, renaming, removing and making folders count. Without a number they are only counted.
    """
    done = 0
    main = threading.get_ident()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if threading.get_ident() != main or near not in str(arguments[:2]):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"):
            if number is not None and done == number:
                die()
            done += 1

    sys.addaudithook(hook)
    yield
    if counted is not None:
        counted.write_text(str(done))


def compress_and_die(
    model: str, out: str, options: dict[str, Any], at: tuple[str, float] | None, counted: str | None = None
) -> None:
    """Target of a process: compress, and die at ("event", n), at a time ("time", s) or at an operation ("file", n)."""
    from featherweight.tasks.compress.compression import compress

    kind, moment = at or ("file", None)
    events = 0

    def observe(event: dict[str, Any]) -> None:
        nonlocal events
        if kind == "event" and events == moment:
            die()
        events += 1

    if kind == "time":
        assert moment is not None
        timer = threading.Timer(moment, die)
        timer.daemon = True
        timer.start()
    number = int(moment) if kind == "file" and moment is not None else None
    with dying_at_file_operation(Path(out).name, number, Path(counted) if counted else None):
        compress(model, out=out, observer=observe, threads=1, **options)
