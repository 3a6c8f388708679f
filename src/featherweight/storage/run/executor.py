"""Doing independent jobs: in this process, or shared with others that work on the same run folder.

A job is a key and what to do. Whether it is done is what the store of the run says, nothing else: an executor remembers
nothing, so a process may end at any moment, and another that has the same jobs finishes them. Those who share take a
job by holding the lock file of its key, which the system frees when they end, however they end. What runs the jobs,
processes here or tasks of a cluster that see the same folder, needs no more than `take_part`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from featherweight.errors import OutputError
from featherweight.system.locks import FileLock

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One job; it depends on no other.

    key : names it in the store
    find : its record from the store, None while it is not done; what is damaged is removed by that
    work : do it, keep it in the store, and give its record
    """

    key: str
    find: Callable[[], Record | None]
    work: Callable[[], Record]


class Done(NamedTuple):
    """place : of the task among those that were given
    found : it was done before the executor began
    """

    place: int
    record: Record
    found: bool


class Executor(Protocol):
    """Does jobs, each once."""

    def run(self, tasks: Sequence[Task]) -> Generator[Done, None, None]:
        """Every task's record, in the order in which they come to be known; whoever stops before the end closes it."""
        ...


class Local:
    """One job after the other, in this process alone."""

    def run(self, tasks: Sequence[Task]) -> Generator[Done, None, None]:
        for place, task in enumerate(tasks):
            record = task.find()
            found = record is not None
            yield Done(place, record if record is not None else task.work(), found)


class Shared:
    """Jobs that other processes take from, too. This one does what they leave, also what they began and did not end.

    Parameters
    ----------
    claims : Path
        Folder of the lock files, one for all who share.
    helpers : Callable[[], AbstractContextManager[object]]
        Enters the other processes when there is something to do, and sees them off in the end.
    """

    def __init__(
        self, claims: Path, helpers: Callable[[], AbstractContextManager[object]] = lambda: nullcontext()
    ) -> None:
        self.claims, self.helpers = claims, helpers

    def run(self, tasks: Sequence[Task]) -> Generator[Done, None, None]:
        left = []
        for place, task in enumerate(tasks):
            record = task.find()
            if record is not None:
                yield Done(place, record, True)
            else:
                left.append(place)
        if not left:
            return
        with self.helpers() if len(left) > 1 else nullcontext():
            while left:
                taken = []
                for place in left:
                    record = _take(tasks[place], self.claims)
                    if record is None:
                        taken.append(place)
                    else:
                        yield Done(place, record, False)
                if len(taken) == len(left):  # nothing is left but what others are at: wait for the first of them
                    place = taken.pop(0)
                    record = _take(tasks[place], self.claims, wait=True)
                    assert record is not None
                    yield Done(place, record, False)
                left = taken


def take_part(tasks: Sequence[Task], claims: Path) -> int:
    """Do what nobody has done or taken, once through the tasks; how many that were.

    For a process that helps one with a `Shared` executor, which also does what helpers leave.
    """
    done = 0

    def counted(task: Task) -> Record:
        nonlocal done
        done += 1
        return task.work()

    for task in tasks:
        _take(Task(task.key, task.find, lambda task=task: counted(task)), claims)  # type: ignore[misc]
    return done


def _take(task: Task, claims: Path, wait: bool = False) -> Record | None:
    """The record of a task, from the store or from work; None where another process is at it.

    Raises OutputError where there are no locks: two processes would write the same file.
    """
    with FileLock(claims / (quote(task.key, safe="") + ".lock")) as claim:
        if not claim.acquire(wait):
            return None
        if not claim.enforced:
            raise OutputError(
                f"the file system of {claims} has no locks, which processes that share a run need; leave --workers out"
            )
        record = task.find()
        return record if record is not None else task.work()
