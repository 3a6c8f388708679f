"""How many threads to use: what the caller says, else the environment, else what the system lets this process have."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from featherweight.errors import FeatherError
from featherweight.system.control_groups import CONTROL_GROUPS, MEMBERSHIP, control_groups

VARIABLE = "FEATHERWEIGHT_THREADS"
MOST = 1024
"""More are refused: a mistake, which would have the system start them all."""
MOST_BY_DEFAULT = 64
"""Beyond, memory is the limit of what we do, and meeting at barriers costs more than a further processor brings."""

_chosen: ContextVar[int | None] = ContextVar("_chosen", default=None)


def thread_count(threads: int | None = None) -> int:
    """Threads to use: the argument, else that of `use_threads`, else FEATHERWEIGHT_THREADS, else OMP_NUM_THREADS, else
    as many as the system lets this process have. FeatherError for a number that makes no sense.
    """
    return _decided(threads)[0]


def thread_reason(threads: int | None = None) -> str:
    """Where `thread_count` has its number from, for people."""
    return _decided(threads)[1]


def chosen_threads(threads: int | None = None) -> int | None:
    """The number that somebody has decided on for featherweight; None if nobody has."""
    if threads is not None:
        return checked(threads, "threads")
    if _chosen.get() is not None:
        return _chosen.get()
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    try:
        return checked(int(text), VARIABLE)
    except ValueError:
        raise FeatherError(f"{VARIABLE} is {text[:40]!r}, expected a number of threads from 1 to {MOST}") from None


def checked(threads: int, name: str) -> int:
    """A number of threads that somebody has given. FeatherError if there can be no such number."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST:
        raise FeatherError(f"{name} is {threads!r}, expected a number of threads from 1 to {MOST}")
    return threads


@contextlib.contextmanager
def use_threads(threads: int | None) -> Iterator[int]:
    """Within, `thread_count()` is this number, or what it was for None, in this thread and in PyTorch."""
    count = thread_count(threads)
    token = _chosen.set(count if threads is not None else _chosen.get())
    try:
        with _torch.using(count):
            yield count
    finally:
        _chosen.reset(token)


def _decided(threads: int | None) -> tuple[int, str]:
    chosen = chosen_threads(threads)
    if chosen is not None:
        return chosen, VARIABLE if threads is None and _chosen.get() is None else "as asked for"
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdigit() and 1 <= int(first) <= MOST:
        return int(first), "OMP_NUM_THREADS"
    allowed, quota = _processors(), cpu_quota()
    count = min(allowed, MOST_BY_DEFAULT) if quota is None else min(allowed, max(1, int(quota)), MOST_BY_DEFAULT)
    reason = f"{allowed} processors allowed"
    if quota is not None:
        reason += f", the container's quota is {quota:g}"
    return count, reason + (f", at most {MOST_BY_DEFAULT} by default" if allowed > MOST_BY_DEFAULT else "")


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


@functools.lru_cache(maxsize=4)
def cpu_quota(membership: Path = MEMBERSHIP, root: Path = CONTROL_GROUPS) -> float | None:
    """Processors' worth of time that the control groups of this process, versions 1 and 2, give it; None: no limit."""
    found: list[float] = []
    for group, version in control_groups("cpu", membership, root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = _quota_v2(group) if version == 2 else _quota_v1(group)
            if quota is not None and quota > 0:
                found.append(quota)
    return min(found, default=None)


def _quota_v2(group: Path) -> float | None:
    most, period = (group / "cpu.max").read_text().split()
    return None if most == "max" else int(most) / int(period)


def _quota_v1(group: Path) -> float | None:
    most = int((group / "cpu.cfs_quota_us").read_text())
    return None if most < 0 else most / int((group / "cpu.cfs_period_us").read_text())


class _TorchThreads:
    """PyTorch has one number for the process and one for each thread; several of ours may want their own meanwhile.

    Each puts back what it found, and the last one what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users, self._first = 0, 0

    @contextlib.contextmanager
    def using(self, count: int) -> Iterator[None]:
        with self._lock:
            before = torch.get_num_threads()
            self._first = self._first if self._users else before
            self._users += 1
            torch.set_num_threads(count)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                torch.set_num_threads(before if self._users else self._first)


_torch = _TorchThreads()
