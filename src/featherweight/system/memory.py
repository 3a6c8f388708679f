"""Memory of this process: how much is resident, and giving back what a file holds as well."""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from featherweight.system.control_groups import CONTROL_GROUPS, MEMBERSHIP, control_groups

STATUS = Path("/proc/self/status")
PAGEMAP = Path("/proc/self/pagemap")
MEMINFO = Path("/proc/meminfo")
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61  # bits of its entries
LIMIT_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Version of a control group -> files of its limit and of what is used, and the cache's entry in memory.stat."""


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


def give_back_file_pages(tensor: Tensor) -> int:
    """Take the pages of a tensor that is mapped from a file out of memory; the next access reads them from there again.

    Nothing happens to memory that has no file behind it, or that has been written to since: it would be lost.

    Returns
    -------
    the bytes given back: 0, or those of the whole pages inside of the tensor that were resident.
    """
    advise = _madvise()
    first, count, flags = page_flags(tensor)
    if advise is None or not count or any(flag & SWAPPED or (flag & PRESENT and not flag & OF_FILE) for flag in flags):
        return 0
    resident = sum(1 for flag in flags if flag & PRESENT)
    if not resident or advise(first, count * mmap.PAGESIZE, mmap.MADV_DONTNEED) != 0:
        return 0
    return resident * mmap.PAGESIZE


def page_flags(tensor: Tensor) -> tuple[int, int, array.array[int]]:
    """The whole pages inside of a contiguous CPU tensor: address, number, and the entry of each in Linux's pagemap.

    The number is 0 where the system does not tell.
    """
    nothing = 0, 0, array.array("Q")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return nothing
    begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first = -(-begin // mmap.PAGESIZE)
    count = max(0, (begin + size) // mmap.PAGESIZE - first)
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            flags = array.array("Q", file.read(8 * count))
    except (OSError, ValueError):
        return nothing
    return (first * mmap.PAGESIZE, count, flags) if len(flags) == count else nothing


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def available_bytes() -> int:
    """Memory that can be taken without swapping or passing a container's limit; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", MEMINFO.read_text())
        if found:
            return max(1, min([int(found[1]) * 1024, *_left_in_groups()]))
    return 0


def _left_in_groups() -> list[int]:
    """What the control groups of this process, versions 1 and 2, leave it: each limit less what is used for good."""
    left: list[int] = []
    for group, version in control_groups("memory", MEMBERSHIP, CONTROL_GROUPS):
        limit, used, cache = LIMIT_FILES[version]
        with contextlib.suppress(OSError, ValueError):
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
            found = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            left.append(max(0, most - taken + (int(found[1]) if found else 0)))
    return left
