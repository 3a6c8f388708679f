"""What machine this is, in a few facts that make figures of speed and memory comparable."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from featherweight.system.memory import MEMINFO

CPUINFO = Path("/proc/cpuinfo")


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """JSON-able: `processor`, `processors` (that this process may use), `memory_bytes` (None where the system does not
    tell), `system`, `python`, `torch`, and `accelerator` where `device` is one with a name."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "processors": _processors(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(torch.device(device))
    return facts


def now_text() -> str:
    """The time as ISO 8601, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
        if found:
            return re.sub(r"\s+", " ", found[1]).strip()
    return platform.processor() or platform.machine() or "unknown"


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(r"MemTotal:\s*(\d+) kB", MEMINFO.read_text())
        if found:
            return int(found[1]) * 1024
    return None
