"""Which floating-point type the scales of a matrix are stored in."""

from __future__ import annotations

from typing import Literal

import torch

ScaleDtype = Literal["auto", "float16", "float32"]

LARGEST = 6e4  # just below the largest float16, 65504
SMALLEST = 2.0**-10  # a scale is seldom below a 16th of the largest weight: keeps scales in float16's normal range


def scale_dtype_for(setting: ScaleDtype, largest: float) -> torch.dtype:
    """float16, but float32 where scales of a matrix with this largest |weight| would over- or underflow float16."""
    if setting != "auto":
        return torch.float16 if setting == "float16" else torch.float32
    return torch.float16 if largest == 0 or SMALLEST <= largest <= LARGEST else torch.float32
