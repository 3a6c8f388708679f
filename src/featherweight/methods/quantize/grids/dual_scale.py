"""Binary planes with row scales and, inside each group, column scales: D2Quant's dual-scale quantiser (DSQ).

D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs (arXiv 2602.02546), read from the package that is
attributed to its authors. A group X (all rows of `group_size` columns) becomes X_ij = c_j sum_t r_it B_ijt with signs B
and positive r and c, by `iterations` rounds of joint least squares of a row's r, closed-form c, and nearest rounding.
The column scales of a down-projection can be absorbed by the rows of the up-projection, which is a matter of the block;
alone, they are stored in float16.

Departures: the floors of 1e-8 are relative to the largest weight, the normal equations have a ridge of 1e-12 instead of
a floored determinant, and c is stored divided by its median and kept within [1e-3, 1e3], so that it survives float16.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, in_main_memory, nearest_levels
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.methods.quantize.sign_levels import combinations, sign_patterns, signs_of_levels
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.column_scaled import ColumnScaled

FLOOR = 1e-8  # of the largest weight of a group
RIDGE = 1e-12  # of the diagonal
SPREAD = 1e3  # column scales are kept within this factor of their median


class DualScales(NamedTuple):
    """rows [out, bits], columns [n] and signs [out, n, bits] of one group, float64."""

    rows: Tensor
    columns: Tensor
    signs: Tensor


@register("grid", "dual-scale")
class DualScaleGrid(Grid):
    """c_j (+-r_0 +-r_1 ...): levels of a row's group times a scale of the column (see the module)."""

    portable: ClassVar[bool] = True
    group_size: int = Field(128, ge=1, le=1 << 16, description="input columns that share row scales")
    bits: int = Field(2, ge=1, le=4, description="binary planes; 2^bits values")
    iterations: int = Field(15, ge=0, description="rounds of the fit")
    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        dtype = scale_dtype_for(self.scale_dtype, HeldWeight(weight).largest)
        size, columns = self.group_size, weight.shape[1]
        groups = [self._fit_group(weight[:, j : j + size].double()) for j in range(0, columns, size)]
        padded = [torch.nn.functional.pad(c, (0, size - len(c)), value=1.0) for _, c in groups]
        column_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        return {
            "scales": torch.stack([r for r, _ in groups], 1).to(dtype),
            "column_scales": torch.stack(padded).unsqueeze(0).to(column_dtype),
        }

    def _fit_group(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Row scales [out, bits] and column scales [n], as they will be stored but for their dtype."""
        largest = weight.abs().amax()
        if largest == 0:
            return weight.new_zeros(weight.shape[0], self.bits), weight.new_ones(weight.shape[1])
        scaled = weight / largest
        found = start(scaled, self.bits)
        for _ in range(self.iterations):
            found = nearest_signs(scaled, column_step(scaled, row_step(scaled, found)))
        middle = found.columns[scaled.abs().amax(0) > 0].median()
        columns = (found.columns / middle).clamp(1 / SPREAD, SPREAD)
        live = (scaled.abs().amax(1, keepdim=True) > 0).double()
        return found.rows * live * middle * largest, columns

    def levels(self, fit: Fit) -> Tensor:
        return combinations(fit["scales"].float()).sort(dim=-1, stable=True).values

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        scaled = weight / fit["column_scales"].float().reshape(-1)[: weight.shape[1]]
        indices = nearest_levels(scaled, self.levels(fit), self.group_size)
        return self.encode(indices.cpu(), in_main_memory(fit))

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        scales = fit["scales"]
        signs = signs_of_levels(indices, scales.float(), self.group_size)
        inner = BinaryPlanes.encode(signs, scales, self.group_size, scale_dtype=scales.dtype)
        return ColumnScaled(inner, fit["column_scales"][0].reshape(-1)[: indices.shape[1]].contiguous())

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        dtype = dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16)
        inner = {
            "kind": "binary-planes",
            "planes": self.bits,
            "group_size": self.group_size,
            "rows_per_scale": 1,
            "scale_dtype": dtype,
        }
        return {"kind": "column-scaled", "shape": list(shape), "scale_dtype": dtype, "inner": inner}


def start(weight: Tensor, planes: int) -> DualScales:
    """Column scales mean |w|, then planes from the signs of what the planes before leave; weight [out, n]."""
    columns = weight.abs().mean(0).clamp(min=FLOOR)
    rest = weight.clone()
    rows, signs = [], []
    for _ in range(planes):
        sign = torch.where(rest >= 0, 1.0, -1.0).to(weight.dtype)
        scale = ((rest * sign) @ columns).abs() / (columns @ columns)
        rest -= scale.unsqueeze(-1) * sign * columns
        rows.append(scale)
        signs.append(sign)
    return DualScales(torch.stack(rows, -1), columns, torch.stack(signs, -1))


def row_step(weight: Tensor, scales: DualScales) -> DualScales:
    """Step a: all scales of a row by least squares; a negative one flips its plane."""
    scaled = scales.signs * scales.columns.unsqueeze(-1)  # [out, n, planes]
    gram = scaled.mT @ scaled
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = RIDGE * (scales.columns @ scales.columns) * unit
    rows = torch.linalg.solve(gram + ridge, (weight.unsqueeze(1) @ scaled).mT).squeeze(-1)
    flips = torch.where(rows < 0, -1.0, 1.0).to(weight.dtype)
    return DualScales(rows.abs().clamp(min=FLOOR), scales.columns, scales.signs * flips.unsqueeze(1))


def column_step(weight: Tensor, scales: DualScales) -> DualScales:
    """Step b: the column scales in closed form."""
    sums = (scales.signs @ scales.rows.unsqueeze(-1)).squeeze(-1)  # [out, n]
    power = (sums * sums).sum(0)
    columns = torch.where(power > 0, (weight * sums).sum(0).abs() / power.clamp(min=FLOOR**4), scales.columns)
    return scales._replace(columns=columns.clamp(min=FLOOR))


def nearest_signs(weight: Tensor, scales: DualScales) -> DualScales:
    """Step c: every entry to the nearest level."""
    levels, order = combinations(scales.rows).sort(dim=-1, stable=True)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    indices = torch.searchsorted(middles.contiguous(), (weight / scales.columns).contiguous())
    patterns = sign_patterns(scales.rows.shape[-1]).to(weight)
    return scales._replace(signs=patterns[order.gather(-1, indices)])
