"""Sums of binary planes, W = sum_i a_i B_i with B in {-1, +1}, by alternating least squares; scales may be shifts.

ShiftAddLLM (arXiv 2406.05981), fit A: a greedy start, then rounds of (a) least squares of the scales, (b) |a| sorted
descending, (c) each scale replaced by a sum of `terms` signed powers of two, (d) every weight to the nearest of the
2^bits sums. With `terms: 0` step (c) is left out and the fit is plain binary coding quantisation (BCQ).

Who shares scales: `rows_per_scale` rows of `group_size` columns. The paper's accurate form is group_size 1 with all
rows (or 128), each column fitted when a sweep reaches it; its fast form group_size 8 with `strips: 8`.

Departures, both options: the best round is kept (`keep: last` is the published choice; powers of two make rounds go up
and down), and with terms the only plane of bits = 1, which the paper leaves a float, is made of powers of two as well.
Least squares are solved directly with a ridge of 1e-12, where the authors run conjugate gradients with 1e-6.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Fit, SolveOptions
from featherweight.methods.quantize.row_grid import RowGrid, grouped
from featherweight.methods.quantize.sign_levels import combinations, sign_patterns, signs_of_levels
from featherweight.methods.quantize.sorted_groups import SortedGroups
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms, values_of_shifts

RIDGE = 1e-12  # of the number of weights: splits the scale of equal planes evenly, as a pseudo-inverse would
EXPONENTS = 20  # powers of two below the largest weight that must be in reach of the stored shifts


@register("grid", "binary-planes")
class BinaryPlaneGrid(RowGrid):
    """2^bits values +-a_1 +-a_2 ..., free scales or sums of powers of two (see the module)."""

    portable: ClassVar[bool] = True
    bits: int = Field(3, ge=1, le=4, description="binary planes; 2^bits values")
    rounds: int = Field(50, ge=0, description="alternating rounds at most")
    terms: int = Field(0, ge=0, le=4, description="signed powers of two a scale is a sum of; 0: floating-point scales")
    keep: Literal["best", "last"] = Field("best", description="round whose scales are taken")
    rows_per_scale: int | Literal["all"] = Field(1, description="neighbouring rows that share scales, or all")
    strips: int = Field(0, ge=0, description="instead of rows_per_scale: strips the rows are cut into; 0: unused")
    exponent_bias: int = Field(64, ge=0, le=200, description="stored shifts span 2^(1 - bias) to 2^(127 - bias)")

    @model_validator(mode="after")
    def _one_rule(self) -> BinaryPlaneGrid:
        if self.strips and self.rows_per_scale != 1:
            raise ValueError("strips and rows_per_scale both say which rows share scales; set one of them")
        if self.rows_per_scale != "all" and self.rows_per_scale < 1:
            raise ValueError("rows_per_scale must be at least 1, or all")
        return self

    def rows_together(self, rows: int) -> int:
        if self.strips:
            return -(-rows // self.strips)
        return rows if self.rows_per_scale == "all" else min(rows, self.rows_per_scale)

    def _window_rows(self, shape: tuple[int, int], options: SolveOptions) -> int:
        """Strips are shares of all rows, so that a window of some rows has other strips: one window."""
        return shape[0] if self.strips else super()._window_rows(shape, options)

    def fit_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Fit:
        rows, together = weight.shape[0], self.rows_together(weight.shape[0])
        values, mask = grouped(weight.double(), self.group_size)
        _, groups, size = values.shape
        counted = mask.expand_as(values).double()
        short = -rows % together

        def shared(tensor: Tensor) -> Tensor:
            """[out, groups, size] to [strips x groups, rows of a strip x size], zero in the padding."""
            strips = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, short)).view(-1, together, groups, size)
            return strips.transpose(1, 2).reshape(-1, together * size)

        if self.terms:
            self._check_reach(float(weight.abs().amax()))
        scales = self._alternate(shared(values), shared(counted)).view(-1, groups, self.bits)
        stored = power_of_two_terms(scales, self.terms, self.exponent_bias) if self.terms else scales.to(dtype)
        name = "shifts" if self.terms else "scales"
        return {name: stored.repeat_interleave(together, dim=0)[:rows]}

    def _check_reach(self, largest: float) -> None:
        low, high = 2.0 ** (1 - self.exponent_bias + EXPONENTS), 2.0 ** (126 - self.exponent_bias)
        if largest and not low <= largest <= high:
            raise ValueError(
                f"the largest weight is {largest:.3g}, but shifts with exponent_bias {self.exponent_bias} serve "
                f"weights from {low:.3g} to {high:.3g}; set the grid's exponent_bias, or terms to 0"
            )

    def _alternate(self, values: Tensor, counted: Tensor) -> Tensor:
        """Scales float64 [R, bits], before their rounding to what is stored, of groups [R, n] with padding marked 0."""
        scales, gram, right = greedy(values, counted, self.bits)
        scales = self._storable(scales)
        if self.bits == 1 or self.rounds == 0:
            return scales
        groups = SortedGroups(values, counted)
        patterns = sign_patterns(self.bits).to(groups.mass.device, torch.float64)
        best, least = scales, torch.full_like(groups.mass, torch.inf)
        for _ in range(self.rounds):
            before = scales
            scales = self._storable(solve(gram, right, groups.mass).abs().sort(dim=-1, descending=True).values)
            levels, order = combinations(scales).sort(dim=-1, stable=True)
            mass, first = groups.cells((levels[:, 1:] + levels[:, :-1]) / 2)
            error = groups.second - (2 * levels * first - levels * levels * mass).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better.unsqueeze(-1), scales, best)
            if torch.equal(scales, before):
                break
            signs = patterns[order]  # [R, 2^bits, bits]
            gram = torch.einsum("rl,rli,rlj->rij", mass, signs, signs)
            right = torch.einsum("rl,rli->ri", first, signs)
        return best if self.keep == "best" else scales

    def _storable(self, scales: Tensor) -> Tensor:
        if not self.terms:
            return scales
        return values_of_shifts(power_of_two_terms(scales, self.terms, self.exponent_bias), self.exponent_bias).double()

    def _scales(self, fit: Fit) -> Tensor:
        """float32 [out, groups, bits]."""
        return values_of_shifts(fit["shifts"], self.exponent_bias) if self.terms else fit["scales"].float()

    def levels(self, fit: Fit) -> Tensor:
        return combinations(self._scales(fit)).sort(dim=-1, stable=True).values

    def level_count(self) -> int:
        return 1 << self.bits

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        rows = indices.shape[0]
        together = self.rows_together(rows)
        signs = signs_of_levels(indices, self._scales(fit), self.group_size)
        stored = next(iter(fit.values()))[::together]
        share = self._stored_rows_per_scale(rows)
        if self.terms:
            return BinaryPlanes.encode_shifts(signs, stored, self.group_size, share, self.exponent_bias)
        return BinaryPlanes.encode(signs, stored, self.group_size, share, stored.dtype)

    def _stored_rows_per_scale(self, rows: int) -> int | None:
        return None if self.rows_per_scale == "all" else self.rows_together(rows)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        plain = {
            "kind": "binary-planes",
            "shape": list(shape),
            "planes": self.bits,
            "group_size": self.group_size,
            "rows_per_scale": self._stored_rows_per_scale(shape[0]),
        }
        if self.terms:
            return plain | {"shift_terms": self.terms, "exponent_bias": self.exponent_bias}
        dtype = torch.float32 if self.scale_dtype == "float32" else torch.float16
        return plain | {"scale_dtype": dtype_name(dtype)}


def greedy(values: Tensor, counted: Tensor, planes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Planes from the signs of what the planes before leave (sign of 0 is +1), for groups [R, n].

    Returns scales [R, planes] and the normal equations of the planes: B'B [R, planes, planes] and B'w [R, planes].
    """
    rest = values.clone()
    size = counted.sum(-1).clamp(min=1)
    signs, scales = [], []
    for _ in range(planes):
        sign = torch.where(rest >= 0, counted, -counted)
        scale = (sign * rest).sum(-1) / size
        rest -= scale.unsqueeze(-1) * sign
        signs.append(sign)
        scales.append(scale)
    stacked = torch.stack(signs, 1)
    return torch.stack(scales, -1), stacked @ stacked.mT, (stacked @ values.unsqueeze(-1)).squeeze(-1)


def solve(gram: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Least-squares scales [R, planes] from normal equations; planes that coincide share their scale evenly."""
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = RIDGE * size.clamp(min=1)[:, None, None] * unit
    scales: Tensor = torch.linalg.solve(gram + ridge, right.unsqueeze(-1))
    return scales.squeeze(-1)
