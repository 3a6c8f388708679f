"""Facts of the machine are there and can be written; the time is one that computers read."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from featherweight.system import machine
from featherweight.system.machine import machine_facts, now_text


def test_facts() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["processors"] >= 1
    assert facts["processor"]
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 1 << 27
    assert "accelerator" not in facts


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    facts = machine_facts()
    assert facts["memory_bytes"] is None
    assert facts["processor"]


def test_now() -> None:
    read = datetime.fromisoformat(now_text())
    assert abs(read - datetime.now(timezone.utc)) < timedelta(minutes=1)
