"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Start a new measurement where the system allows it (Linux); elsewhere the peak is that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Largest resident memory since `reset_peak_memory`, plus what was allocated on GPUs at their peaks."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return _peak_resident_bytes() + sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)


def _peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s*(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    return 0


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return int(found[1]) * 1024
    return 0
