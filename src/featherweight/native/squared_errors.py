"""How far a decoded matrix is from the weight: sums of squares by row, native or in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.choice import may_be_native


def squared_errors(weight: Tensor, decoded: Tensor, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Per row, in float64: sum of (weight - decoded)^2 and sum of weight^2.

    weight [n, d] is float32, bfloat16, float16 or float64 and is read as float32; decoded [n, d] is float32.
    The result depends on neither threads nor windows of rows.
    """
    if weight.shape != decoded.shape or decoded.dtype != torch.float32:
        raise ValueError(f"decoded must be float32 {list(weight.shape)}, not {decoded.dtype} {list(decoded.shape)}")
    native = library.get() if may_be_native("auto", weight, decoded) else None
    if native is None or not weight.numel():
        return squared_errors_reference(weight, decoded)
    return native.squared_errors(weight, decoded, threads)


def squared_errors_reference(weight: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The same in PyTorch; equal up to the order of float64 sums."""
    exact = weight.float().double()
    return (exact - decoded.double()).square_().sum(1), exact.square_().sum(1)
