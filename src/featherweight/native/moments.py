"""Second moments sum x y' of activations in bfloat16, summed in float32.

A product of two bfloat16 numbers is exact in float32, so nothing is lost but the order of sums. PyTorch has no such
product for CPUs: its results of bfloat16 inputs are rounded to bfloat16, and with float32 inputs it takes four times as
long as AMX's instructions for pairs of bfloat16 (native/cpp/moments.h; also AVX512-BF16).
"""

from __future__ import annotations

import ctypes
import functools
import warnings

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning
from featherweight.native import library

WITH_PAIRS = ("amx", "bf16")
"""Instruction sets of the products that multiply pairs of bfloat16."""
TOKENS, STRIP = 1024, 32
"""kMomentTokens and kStrip of native/cpp/moments.h."""


class _Job(ctypes.Structure):
    """fw_moment_job of native/cpp/moments.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("left", "right", "sums", "work")],
        *[(name, ctypes.c_int64) for name in ("tokens", "rows", "columns")],
        *[(name, ctypes.c_int64) for name in ("left_stride", "right_stride", "sums_stride", "work_bytes")],
        *[(name, ctypes.c_float) for name in ("kept", "added")],
        ("above", ctypes.c_int32),
    ]


class PairMoment:
    """Adds moments of inputs in bfloat16 to a running one, by instructions for pairs; where `available`."""

    def __init__(self, sums: Tensor, above: bool = False, threads: int | None = None) -> None:
        """
        Parameters
        ----------
        sums : float32 [left columns, right columns], contiguous, on the CPU; changed in place
        above : left and right will be the same inputs, and what lies below the diagonal may hold anything
        """
        self.sums, self.above, self.threads = sums, above, threads
        self._work = torch.empty(_work_bytes(*sums.shape), dtype=torch.uint8, device="cpu")

    def add(self, left: Tensor, right: Tensor, kept: float, added: float) -> None:
        """sums = kept * sums + added * left' right, of bfloat16 [tokens, rows] and [tokens, columns]."""
        native = library.job_function("fw_moment")
        assert native is not None, "ask available() first"
        left, right = (one if one.stride(1) == 1 else one.contiguous() for one in (left, right))
        if left.shape != (len(right), self.sums.shape[0]) or right.shape[1] != self.sums.shape[1]:
            raise ValueError(f"inputs {list(left.shape)} and {list(right.shape)} do not fit {list(self.sums.shape)}")
        pointers = (one.data_ptr() for one in (left, right, self.sums, self._work))
        strides = left.stride(0), right.stride(0), self.sums.stride(0), len(self._work)
        job = _Job(*pointers, *left.shape, right.shape[1], *strides, kept, added, int(self.above))
        library.run_job(native, job, self.threads)


def _work_bytes(rows: int, columns: int) -> int:
    strips = sum(-(-n // STRIP) for n in (rows, columns))
    return 2 * TOKENS * STRIP * strips + 64


def available() -> bool:
    """Whether the instruction set in use multiplies pairs of bfloat16, and small integers rightly."""
    found = library.get()
    return found is not None and found.product_isa in WITH_PAIRS and _trusted(found.product_isa)


@functools.lru_cache(maxsize=8)
def _trusted(isa: str) -> bool:
    if library.job_function("fw_moment") is None:  # a library of an earlier version
        return False
    values = torch.arange(70 * 50, device="cpu").remainder(17).sub(8).view(70, 50).bfloat16()
    moment = PairMoment(torch.full((37, 50), 3.0, dtype=torch.float32, device="cpu"), threads=1)
    moment.add(values[:, :37], values, 2.0, 0.5)
    if torch.equal(moment.sums, 6 + 0.5 * (values[:, :37].float().T @ values.float())):
        return True
    warnings.warn(
        f"second moments by {isa} instructions are wrong on this processor: PyTorch computes them", FallbackWarning, 2
    )
    return False
