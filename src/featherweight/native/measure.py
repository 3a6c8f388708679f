"""Limits of the machine, measured by the native library: memory read and multiply-adds.

A decoder reads every stored weight once for a token, so the first bounds generation; the others bound prompts. Both
loops do nothing else (native/product.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from featherweight.native import library
from featherweight.system.memory import available_bytes
from featherweight.system.threads import thread_count

READ_BYTES = 3 << 29
"""1.5 GiB: the last-level caches of servers reach half a gibibyte."""


def read_bandwidth(size: int | None = None, repeats: int = 3, threads: int | None = None) -> float | None:
    """Bytes a second of reading `size` bytes (READ_BYTES, less where memory is short), the best of `repeats` rounds.

    None without the native library.
    """
    function = _function("fw_read_bandwidth", [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32])
    if function is None:
        return None
    if size is None:
        free = available_bytes()
        size = min(READ_BYTES, max(1 << 20, free // 2)) if free else READ_BYTES
    rate = float(function(size, repeats, thread_count(threads)))
    return rate if rate > 0 else None


def int8_peak(threads: int | None = None) -> float | None:
    """Multiply-adds a second of 8-bit dot products in registers; None without the native library."""
    return _peak("fw_int8_peak", threads)


def bf16_peak(threads: int | None = None) -> float | None:
    """Multiply-adds a second of vector products with bfloat16 weights in the cache; None without the native library.

    Tile registers (AMX) exceed it.
    """
    return _peak("fw_bf16_peak", threads)


def _peak(name: str, threads: int | None) -> float | None:
    function = _function(name, [ctypes.c_int32])
    if function is None:
        return None
    rate = float(function(thread_count(threads)))
    return rate if rate > 0 else None


def _function(name: str, arguments: list[type]) -> Callable[..., float] | None:
    found = library.get()
    function = None if found is None else getattr(ctypes.CDLL(str(found.path)), name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, ctypes.c_double
    return function
