"""Uniform grids of 2 to 8 bits, fitted by min-max or by a search for the clip with least squared error.

The baseline every method is measured against (round to nearest, RTN). Asymmetric: scale = (max - min) / (2^b - 1)
with zero inside the range and an integer zero point, so zero stays exactly zero. Symmetric, zero point 2^(b-1), by
convention: `gptq` (arXiv 2210.17323) scale = 2 max|w| / (2^b - 1); `quarot` scale = max|w| / (2^(b-1) - 1), whose
lowest code is reached by clipping only; `flexq` (arXiv 2508.04405) the same within [1e-5, 1e4].

`mse` shrinks the range by factors 1, 0.99, ... and keeps the one of least sum of |error|^clip_exponent in each group
(GPTQ's toolkits use 2.4); `weighting: gram` counts each column by its mean squared input. `omse` is the symmetric
search of the world-model study (arXiv 2602.02110): scale = r max|w| / (2^(b-1) - 1) within [1e-5, 1e4], r = 0.35 to 1
in 101 steps, the smaller of equally good ones. `axis: output` (per-IC of AdaDim, arXiv 2309.15531) forms groups of
`output_group_size` rows inside a single column; unlike there, ranges always contain zero.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource, in_main_memory
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.native.clip_search import least_error
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name, groups_of
from featherweight.storage.codes.uniform import Uniform

WINDOW_MULTIPLE = 8  # rows: whole bytes of a bit string of any width
OMSE_LOWEST, OMSE_STEPS = 0.35, 100
SEARCHED_TOGETHER = 1 << 19  # scales tried at a time, a bound of the memory of a search
SCALE_LIMITS = 1e-5, 1e4  # of omse and flexq


@register("grid", "uniform")
class UniformGrid(Grid):
    """Evenly spaced values, symmetric or with a zero point (see the module)."""

    portable: ClassVar[bool] = True
    bits: int = Field(4, ge=2, le=8, description="bits a weight; 2^bits values")
    symmetric: bool = Field(False, description="no zero point stored")
    convention: Literal["gptq", "quarot", "flexq"] = Field("gptq", description="scale of symmetric grids, see above")
    clip: Literal["minmax", "mse", "omse"] = Field("minmax", description="range of a group: extremes or least squares")
    clip_steps: int = Field(80, ge=1, le=99, description="ranges tried by mse: 1, 0.99, ... times the extremes")
    clip_exponent: float = Field(2.0, gt=0, le=8, description="power of the error that mse and omse add up")
    weighting: Literal["none", "gram"] = Field("none", description="errors counted by the mean squared input, or alike")
    axis: Literal["input", "output"] = Field("input", description="groups along a row, or along a column (per-IC)")
    output_group_size: int = Field(128, ge=1, description="rows that share scales, with axis: output")
    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")

    @model_validator(mode="after")
    def _consistent(self) -> UniformGrid:
        if not self.symmetric and (self.clip == "omse" or self.convention != "gptq"):
            raise ValueError(
                "clip: omse and the conventions quarot and flexq are for symmetric grids; set symmetric: true"
            )
        if self.axis == "output" and self.group_size != 1:
            raise ValueError(
                "axis: output shares scales inside single columns; set group_size: 1 and output_group_size"
            )
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.weighting == "gram" and self.clip != "minmax" else ()

    @property
    def clamped(self) -> bool:
        """Scales stay within [1e-5, 1e4], as published: groups of smaller weights are lost."""
        return self.clip == "omse" or self.convention == "flexq"

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        dtype = scale_dtype_for(self.scale_dtype, HeldWeight(weight).largest)
        return self._fit(weight, dtype, self._importance(statistics))

    def _importance(self, statistics: Statistics) -> Tensor | None:
        """Weights of squared errors [1, in]; None: all alike."""
        if "gram" not in self.needs or "gram" not in statistics:
            return None
        return statistics["gram"].diagonal().float().nan_to_num(0, 0, 0).clamp(min=0).unsqueeze(0)

    def _fit(self, weight: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Fit:
        if self.axis == "input":
            counted = None if importance is None else self._grouped(importance)
            return self._fit_groups(self._grouped(weight), dtype, counted)
        # Importance is the same all over a group inside one column.
        rows, columns = weight.shape
        together = min(self.output_group_size, rows)
        padded = torch.nn.functional.pad(weight.float().T, (0, -rows % together))
        fit = self._fit_groups(padded.reshape(columns, -1, together), dtype, None)
        return {name: t.T.repeat_interleave(together, dim=0)[:rows] for name, t in fit.items()}

    def _fit_groups(self, groups: Tensor, dtype: torch.dtype, counted: Tensor | None) -> Fit:
        """Parameters [rows, groups] for groups [rows, groups, size]."""
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        trials = self._shares()
        if len(trials) == 1:
            return self._affine(low * trials[0], high * trials[0], dtype)
        shares = torch.tensor(trials, device=groups.device).view(-1, 1, 1)
        rows = max(1, SEARCHED_TOGETHER // (len(trials) * groups.shape[1]))
        fits = []
        parts = [tensor.split(rows) for tensor in (groups, low, high)]  # type: ignore[no-untyped-call]
        for part, lowest, highest in zip(*parts, strict=True):
            tried = self._affine(lowest * shares, highest * shares, dtype)
            chosen = least_error(
                part,
                tried["scales"],
                tried["zero_points"],
                (1 << self.bits) - 1,
                self.clip_exponent,
                counted,
                threads=torch.get_num_threads(),
            ).unsqueeze(0)
            fits.append({name: tensor.gather(0, chosen).squeeze(0) for name, tensor in tried.items()})
        return {name: torch.cat([fit[name] for fit in fits]) for name in fits[0]}

    def _shares(self) -> list[float]:
        """Ranges to be tried, as shares of the extremes."""
        if self.clip == "omse":
            return [OMSE_LOWEST + (1 - OMSE_LOWEST) * i / OMSE_STEPS for i in range(OMSE_STEPS + 1)]
        return [1 - step / 100 for step in range(self.clip_steps if self.clip == "mse" else 1)]

    def _affine(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Fit:
        steps = (1 << self.bits) - 1
        if self.symmetric:
            scales = self._symmetric_scale(torch.maximum(-low, high))
            zero_points = torch.full_like(scales, 1 << (self.bits - 1))
        else:
            scales = (high - low) / steps
            zero_points = (-low / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(0, steps)
        return {"scales": scales.to(dtype), "zero_points": zero_points}

    def _symmetric_scale(self, largest: Tensor) -> Tensor:
        if self.clip != "omse" and self.convention == "gptq":
            return 2 * largest / ((1 << self.bits) - 1)
        scales = largest / ((1 << (self.bits - 1)) - 1)
        return scales.clamp(*SCALE_LIMITS) if self.clamped else scales

    def _codes(self, groups: Tensor, fit: Fit) -> Tensor:
        scales = fit["scales"].float().unsqueeze(-1)
        steps = torch.where(scales > 0, groups / scales, torch.zeros_like(groups)).round()
        return (steps + fit["zero_points"].unsqueeze(-1)).clamp(0, (1 << self.bits) - 1)

    def _grouped(self, weight: Tensor) -> Tensor:
        """[out, groups, group_size]; a short last group is filled with zeros, which change neither range nor error."""
        rows, columns = weight.shape
        size = min(self.group_size, columns)
        short = -columns % size
        return torch.nn.functional.pad(weight.float(), (0, short)).view(rows, -1, size)

    def levels(self, fit: Fit) -> Tensor:
        zero_points = fit["zero_points"].unsqueeze(-1)
        steps = torch.arange(1 << self.bits, dtype=torch.float32, device=zero_points.device) - zero_points
        return steps * fit["scales"].float().unsqueeze(-1)

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        rows, columns = weight.shape
        codes = self._codes(self._grouped(weight), fit).view(rows, -1)[:, :columns]
        return self.encode(codes.to("cpu", torch.uint8), in_main_memory(fit))

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        if self.axis == "output":
            stored = {name: tensor[:: min(self.output_group_size, len(tensor))] for name, tensor in fit.items()}
            scales, zero_points = stored["scales"], None if self.symmetric else stored["zero_points"]
            size, dtype = self.output_group_size, scales.dtype
            return Uniform.encode(indices, scales, zero_points, self.bits, size, scale_dtype=dtype, axis="output")
        return Uniform.encode(
            indices,
            fit["scales"],
            None if self.symmetric else fit["zero_points"],
            self.bits,
            self.group_size,
            scale_dtype=fit["scales"].dtype,
        )

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        rows, _ = source.shape
        dtype = scale_dtype_for(self.scale_dtype, source.largest)
        importance = self._importance(statistics)
        step = options.window_rows(source.shape, 16, self._rows_together)
        if self.axis == "output":
            return self._quantize_columns(source, dtype, step)
        parts: list[Uniform] = []
        for first in range(0, rows, step):
            last = min(rows, first + step)
            window = source.rows(first, last).float()
            part = self.nearest(window, self._fit(window, dtype, importance))
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

    @property
    def _rows_together(self) -> int:
        """A window has a multiple of so many rows."""
        return WINDOW_MULTIPLE if self.axis == "input" else math.lcm(WINDOW_MULTIPLE, self.output_group_size)

    def _quantize_columns(self, source: WeightSource, dtype: torch.dtype, step: int) -> Code:
        """`quantize_source` for groups along columns: windows of whole groups, packed together in the end."""
        (rows, columns), fits = source.shape, []
        codes = torch.empty(source.shape, dtype=torch.uint8, device="cpu")
        for first in range(0, rows, step):
            last = min(rows, first + step)
            window = source.rows(first, last).float()
            fit = self._fit(window, dtype)
            codes[first:last] = self._codes(window.unsqueeze(-1), fit).view(-1, columns)
            fits.append(in_main_memory(fit))
            source.release(first, last)
        return self.encode(codes, {name: torch.cat([fit[name] for fit in fits]) for name in fits[0]})

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "uniform",
            "shape": list(shape),
            "bits": self.bits,
            "symmetric": self.symmetric,
            "group_size": self.group_size if self.axis == "input" else self.output_group_size,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
            **({} if self.axis == "input" else {"axis": self.axis}),
        }

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = min(rows, options.window_rows(shape, 16, self._rows_together)) * columns
        if self.axis == "output":  # parameters of every column and row stand beside the codes
            return 24 * window + rows * columns * (1 + 8 + self.bits // 8)
        # five float32 copies of a window while the clip is searched, a few of the scales tried together, and the packed
        # result twice while it is joined
        trials = len(self._shares())
        searched = 0 if trials == 1 else min(SEARCHED_TOGETHER, trials * rows * groups_of(columns, self.group_size))
        packed = rows * columns * self.bits // 8 + 3 * rows * groups_of(columns, self.group_size)
        return 24 * (window + searched) + 2 * packed
