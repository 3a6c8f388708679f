"""Jobs that processes share: each is done, by one of them, and what one of them leaves the others do."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import OutputError
from featherweight.storage.run.executor import Local, Shared, Task, take_part
from featherweight.storage.run.store import Store
from featherweight.system.locks import FileLock
from outputs import die, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs locks and processes that can be killed")

COUNT = 24


def square(folder: Path, number: int, seconds: float, deadly: int | None = None) -> Task:
    """A job that squares a number, and says in a file of its own which process began it."""
    store, key = Store(folder / "store"), f"job-{number}"

    def work() -> dict[str, Any]:
        with (folder / "begun" / f"{number} {os.getpid()} {time.monotonic_ns()}").open("w"):
            pass
        time.sleep(seconds)
        if number == deadly:
            die()
        record = {"square": number**2}
        store.keep(key, {"number": torch.tensor(number)}, record)
        return record

    return Task(key, lambda: store.record(key), work)


def tasks(folder: Path, seconds: float = 0.01, deadly: int | None = None) -> list[Task]:
    return [square(folder, number, seconds, deadly) for number in range(COUNT)]


def begun(folder: Path) -> list[tuple[int, int]]:
    """Number and process of each time a job was begun."""
    words = [path.name.split() for path in (folder / "begun").iterdir()]
    return [(int(number), int(process)) for number, process, _ in words]


def take(folder: str, deadly: int | None) -> None:
    """Target of a process."""
    take_part(tasks(Path(folder), 0.05, deadly), Path(folder) / "claims")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("store", "claims", "begun"):
        (tmp_path / name).mkdir()
    return tmp_path


def records(done: list[Any]) -> dict[int, int]:
    assert len({one.place for one in done}) == len(done)
    return {one.place: one.record["square"] for one in done}


SQUARES = {number: number**2 for number in range(COUNT)}


def test_local(folder: Path) -> None:
    Store(folder / "store").keep("job-3", {}, {"square": 9})
    done = list(Local().run(tasks(folder)))
    assert [one.place for one in done] == list(range(COUNT))
    assert records(done) == SQUARES
    assert [one.place for one in done if one.found] == [3]
    assert sorted(number for number, _ in begun(folder)) == [n for n in range(COUNT) if n != 3]


@pytest.mark.parametrize("deadly", [None, 5])
def test_shared_by_processes(folder: Path, deadly: int | None) -> None:
    """Three processes; where two of them die over a job, this one does it."""
    Store(folder / "store").keep("job-3", {}, {"square": 9})
    helpers = [start(take, str(folder), deadly) for _ in range(2)]

    @contextmanager
    def helped() -> Any:
        while len(begun(folder)) < 2 + (deadly or 0):
            time.sleep(0.01)
        yield

    done = list(Shared(folder / "claims", helped).run(tasks(folder, 0.05)))
    for helper in helpers:
        helper.join(60)
    assert records(done) == SQUARES
    assert [one.place for one in done if one.found and one.place == 3] == [3]
    times = Counter(number for number, _ in begun(folder))
    assert set(times) == set(range(COUNT)) - {3}
    assert {number for number, count in times.items() if count > 1} <= {deadly}, "a job was done twice"
    assert len({process for _, process in begun(folder)}) >= 2
    if deadly is not None:
        assert -9 in [helper.exitcode for helper in helpers]


def test_a_job_that_others_are_at_is_waited_for(folder: Path) -> None:
    """It is done by the other in the end, and not twice."""
    helper = start(take, str(folder), None)
    while not begun(folder):
        time.sleep(0.01)
    assert records(list(Shared(folder / "claims").run(tasks(folder)))) == SQUARES
    helper.join(60)
    assert max(Counter(number for number, _ in begun(folder)).values()) == 1


def test_what_fails_is_raised_and_can_be_done_again(folder: Path) -> None:
    def fail() -> dict[str, Any]:
        raise OutputError("no")

    broken = tasks(folder)
    broken[4] = Task(broken[4].key, broken[4].find, fail)
    with pytest.raises(OutputError, match="no"):
        list(Shared(folder / "claims").run(broken))
    done = list(Shared(folder / "claims").run(tasks(folder)))
    assert records(done) == SQUARES
    assert [one.place for one in done if one.found] == [0, 1, 2, 3]


def test_without_locks_nothing_is_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = FileLock.acquire

    def without(self: FileLock, wait: bool = False) -> bool:
        found = acquire(self, wait)
        self.enforced = False
        return found

    monkeypatch.setattr(FileLock, "acquire", without)
    with pytest.raises(OutputError, match=r"has no locks.*leave --workers out"):
        list(Shared(folder / "claims").run(tasks(folder)))
    assert begun(folder) == []
