"""How many threads there are to be: who decides, what is refused, and that it reaches all that computes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from featherweight.errors import FeatherError
from featherweight.model.products.structs import threads_of
from featherweight.system import threads as module
from featherweight.system.threads import cpu_quota, thread_count, thread_reason, use_threads


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEATHERWEIGHT_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "cpu_quota", lambda: None)


def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processors", lambda: 12)
    assert (thread_count(), thread_reason()) == (12, "12 processors allowed")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert (thread_count(), thread_reason()) == (4, "OMP_NUM_THREADS")
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", "3")
    assert (thread_count(), thread_reason()) == (3, "FEATHERWEIGHT_THREADS")
    with use_threads(2):
        assert thread_count() == 2
        assert thread_count(7) == 7
    assert thread_count() == 3


@pytest.mark.parametrize(("quota", "count"), [(0.5, 1), (1.5, 1), (2.0, 2), (7.9, 7), (100.0, 12)])
def test_a_container_s_quota(quota: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processors", lambda: 12)
    monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    assert thread_count() == count
    assert f"quota is {quota:g}" in thread_reason()


def test_many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processors", lambda: 384)
    assert thread_count() == 64
    assert "at most 64" in thread_reason()
    assert thread_count(300) == 300


@pytest.mark.parametrize("value", ["20000", "abc", "0", "-1", "1.5", "4 threads", "1025"])
def test_what_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", value)
    for ask in (thread_count, threads_of):
        with pytest.raises(
            FeatherError, match="FEATHERWEIGHT_THREADS is .*, expected a number of threads from 1 to 1024"
        ):
            ask()
        assert ask(2) == 2
    with pytest.raises(FeatherError, match="expected a number of threads"):
        thread_count(int(value) if value.lstrip("-").isdigit() else value)  # type: ignore[arg-type]


def test_blank_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", " ")
    assert thread_count() >= 1


def test_control_groups(tmp_path: Path) -> None:
    """Versions 1 and 2, limits of a group above, and a container whose path is that of the host."""
    membership, root = tmp_path / "cgroup", tmp_path / "fs"

    def quota(text: str) -> float | None:
        membership.write_text(text)
        cpu_quota.cache_clear()
        return cpu_quota(membership, root)

    inner = root / "user" / "job"
    inner.mkdir(parents=True)
    assert quota("0::/user/job\n") is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert quota("0::/user/job\n") is None
    (root / "user" / "cpu.max").write_text("150000 100000\n")
    assert quota("0::/user/job\n") == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert quota("0::/user/job\n") == 0.5
    (root / "cpu.max").write_text("400000 100000\n")
    assert quota("0::/somewhere/else\n") == 4.0
    old = root / "cpu,cpuacct" / "docker"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu.max").unlink()
    assert quota("4:cpu,cpuacct:/docker\n3:memory:/docker\n") is None
    (old / "cpu.cfs_quota_us").write_text("250000\n")
    assert quota("4:cpu,cpuacct:/docker\n3:memory:/docker\n") == 2.5
    assert quota("nonsense\n") is None
    assert cpu_quota(tmp_path / "nothing", root) is None
    cpu_quota.cache_clear()


def test_pytorch_has_its_number_again() -> None:
    """Also when runs in several threads overlap."""
    before = torch.get_num_threads()
    entered, left = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        with use_threads(3):
            entered.set()
            left.wait(30)
            seen.append(thread_count())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    with use_threads(2):
        thread.start()
        entered.wait(30)
        assert thread_count() == 2  # the other thread's is its own
    left.set()
    thread.join(30)
    assert seen == [3, before]
    assert torch.get_num_threads() == before
    fresh: list[int] = []
    late = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    late.start()
    late.join(30)
    assert fresh == [before]


def test_operators_follow() -> None:
    with use_threads(2):
        assert threads_of() == 2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert threads_of() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert thread_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
