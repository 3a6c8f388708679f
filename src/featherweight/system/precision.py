"""Which floating-point type passes through a network are made in: asked for, or the one that is faster where it runs.

bfloat16 halves the time of a product where the processor multiplies it itself (AVX512-BF16, AMX, Arm's BF16). Elsewhere
libraries convert it back and forth: two to twenty times slower than float32, a hundred times in some backward products.
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch

from featherweight.errors import FeatherError
from featherweight.events import Observer

Precision = Literal["auto", "float32", "bfloat16"]
Chosen = Literal["float32", "bfloat16"]

VARIABLE = "FEATHERWEIGHT_PRECISION"
"""Environment variable with which results are the same on every processor."""
ROWS, COLUMNS, OUTPUTS = 512, 512, 1024
"""A linear layer of some milliseconds: in smaller ones waking the threads counts for more than the product."""
TRIALS = 3
ENOUGH = 0.8
"""bfloat16 is taken below this share of float32's time: it is half of it with the instructions, twice without."""


def choose_precision(wanted: Precision, notify: Observer | None = None, device: torch.device | str = "cpu") -> Chosen:
    """What passes are made in on a device; `notify` gets an event that says so where the choice was ours.

    Parameters
    ----------
    wanted : "auto" takes FEATHERWEIGHT_PRECISION or, where that is not set, times both on the device, once a process;
        the others are taken as they are
    notify : gets {"event": "precision", "chosen": ..., "text": ...}

    Raises FeatherError if FEATHERWEIGHT_PRECISION is neither float32 nor bfloat16.
    """
    if wanted != "auto":
        return wanted
    chosen, reason = _asked_for() or _faster_on(device)
    if notify is not None:
        notify({"event": "precision", "chosen": chosen, "text": f"the network runs in {chosen}: {reason}"})
    return chosen


def _asked_for() -> tuple[Chosen, str] | None:
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value in ("", "auto"):
        return None
    for known in get_args(Chosen):
        if value == known:
            return known, f"{VARIABLE} says so"
    raise FeatherError(f"{VARIABLE} is {value!r}, expected float32, bfloat16 or auto")


def _faster_on(device: torch.device | str) -> tuple[Chosen, str]:
    ratio = bfloat16_time_ratio(str(device))
    reason = f"a layer in bfloat16 takes {ratio:.2g} times float32 here"
    return ("bfloat16", reason) if ratio < ENOUGH else ("float32", reason)


@functools.cache
def bfloat16_time_ratio(device: str = "cpu") -> float:
    """Time of a linear layer, forwards and backwards, in bfloat16 by that in float32; the least of a few trials."""
    if not torch.amp.is_autocast_available(torch.device(device).type):
        return float("inf")  # nothing computes in bfloat16 by itself there
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    times: dict[bool, list[float]] = {False: [], True: []}
    with torch.inference_mode(False), torch.enable_grad():
        inputs = torch.randn(ROWS, COLUMNS, generator=generator).to(device).requires_grad_()
        weight = torch.randn(OUTPUTS, COLUMNS, generator=generator).to(device).requires_grad_()
        for trial in range(TRIALS + 1):
            for halved, found in times.items():
                begun = time.perf_counter()
                with autocast("bfloat16" if halved else "float32", device):
                    product = torch.nn.functional.linear(inputs, weight)
                made, _ = torch.autograd.grad(product.float().sum(), (inputs, weight))
                made[0, 0].item()  # a device is done when its numbers are here
                if trial > 0:  # the first one builds the kernels
                    found.append(time.perf_counter() - begun)
    return min(times[True]) / min(times[False])


def autocast(precision: Chosen, device: torch.device | str = "cpu") -> AbstractContextManager[Any]:
    """A context in which linear layers on a device compute in `precision`."""
    kind = torch.device(device).type
    if precision == "float32" and not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bfloat16")
