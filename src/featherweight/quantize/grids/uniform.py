"""Uniform grids of 2 to 8 bits, fitted by min-max or by a search for the clip with least squared error.

The baseline every method is measured against (round to nearest, RTN). Asymmetric: scale = (max - min) / (2^b - 1)
with zero inside the range and an integer zero point, so zero stays exactly zero. Symmetric: scale = 2 max|w| /
(2^b - 1), zero point 2^(b-1). `mse` shrinks the range by factors 1, 0.99, ... and keeps the best of each group.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.codes import Code
from featherweight.codes.base import dtype_name, groups_of
from featherweight.codes.uniform import Uniform
from featherweight.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource
from featherweight.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.registry import register

WINDOW_MULTIPLE = 8  # rows: whole bytes of a bit string of any width


@register("grid", "uniform")
class UniformGrid(Grid):
    """Evenly spaced values, symmetric or with a zero point (see the module)."""

    bits: int = Field(4, ge=2, le=8, description="bits a weight; 2^bits values")
    symmetric: bool = Field(False, description="no zero point stored")
    clip: Literal["minmax", "mse"] = Field("minmax", description="range of a group: its extremes, or least squares")
    clip_steps: int = Field(80, ge=1, le=99, description="ranges tried by mse: 1, 0.99, ... times the extremes")
    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")

    def fit(self, weight: Tensor) -> Fit:
        return self._fit(weight, scale_dtype_for(self.scale_dtype, HeldWeight(weight).largest))

    def _fit(self, weight: Tensor, dtype: torch.dtype) -> Fit:
        groups = self._grouped(weight)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best = self._affine(low, high, dtype)
        if self.clip == "minmax":
            return best
        error = self._squared_error(groups, best)
        for step in range(1, self.clip_steps):
            share = 1 - step / 100
            trial = self._affine(low * share, high * share, dtype)
            found = self._squared_error(groups, trial)
            better = found < error
            error = torch.where(better, found, error)
            best = {name: torch.where(better, trial[name], best[name]) for name in best}
        return best

    def _affine(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Fit:
        steps = (1 << self.bits) - 1
        if self.symmetric:
            scales = 2 * torch.maximum(-low, high) / steps
            zero_points = torch.full_like(scales, 1 << (self.bits - 1))
        else:
            scales = (high - low) / steps
            zero_points = (-low / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, steps)
        return {"scales": scales.to(dtype), "zero_points": zero_points}

    def _codes(self, groups: Tensor, fit: Fit) -> Tensor:
        scales = fit["scales"].float().unsqueeze(-1)
        steps = torch.where(scales > 0, groups / scales, torch.zeros_like(groups)).round()
        return (steps + fit["zero_points"].unsqueeze(-1)).clamp(0, (1 << self.bits) - 1)

    def _squared_error(self, groups: Tensor, fit: Fit) -> Tensor:
        decoded = (self._codes(groups, fit) - fit["zero_points"].unsqueeze(-1)) * fit["scales"].float().unsqueeze(-1)
        unit = (
            groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        )  # squares of 1e30 overflow
        return ((groups - decoded) / unit).square_().sum(-1)

    def _grouped(self, weight: Tensor) -> Tensor:
        """[out, groups, group_size]; a short last group is filled with zeros, which change neither range nor error."""
        rows, columns = weight.shape
        size = min(self.group_size, columns)
        short = -columns % size
        return torch.nn.functional.pad(weight.float(), (0, short)).view(rows, -1, size)

    def levels(self, fit: Fit) -> Tensor:
        steps = torch.arange(1 << self.bits, dtype=torch.float32) - fit["zero_points"].unsqueeze(-1)
        return steps * fit["scales"].float().unsqueeze(-1)

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        rows, columns = weight.shape
        codes = self._codes(self._grouped(weight), fit).view(rows, -1)[:, :columns]
        return Uniform.encode(
            codes.to(torch.uint8),
            fit["scales"],
            None if self.symmetric else fit["zero_points"],
            self.bits,
            self.group_size,
            fit["scales"].dtype,
        )

    def quantize_source(self, source: WeightSource, options: SolveOptions) -> Code:
        rows, _ = source.shape
        dtype = scale_dtype_for(self.scale_dtype, source.largest)
        step = options.window_rows(source.shape, 16, WINDOW_MULTIPLE)
        parts: list[Uniform] = []
        for first in range(0, rows, step):
            last = min(rows, first + step)
            window = source.rows(first, last).float()
            part = self.nearest(window, self._fit(window, dtype))
            source.release(first, last)
            assert isinstance(part, Uniform)
            parts.append(part)
        zero_points = [p.zero_points for p in parts if p.zero_points is not None]
        return Uniform(
            torch.cat([p.codes for p in parts]),
            torch.cat([p.scales for p in parts]),
            torch.cat(zero_points) if zero_points else None,
            source.shape,
            self.bits,
            self.group_size,
        )

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "uniform",
            "shape": list(shape),
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.group_size,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = min(rows, options.window_rows(shape, 16, WINDOW_MULTIPLE)) * columns
        # five float32 copies of a window while the clip is searched, and the packed result twice while it is joined
        return 24 * window + 2 * (rows * columns * self.bits // 8 + 3 * rows * groups_of(columns, self.group_size))
