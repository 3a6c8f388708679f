"""Trit-planes fitted by PTQTP: W = sum of K ternary planes with a scale each per group.

Post-Training Quantization to Trit-Planes for Large Language Models (arXiv 2509.16989): scales by 2x2 ridge
regression, trits by exhaustive search over the 3^K combinations, alternating to convergence. With the default
settings this is the published algorithm; it needs nothing but the weights. `tied`, `starts`, `closing`,
`final_least_squares` and K other than 2 are not in the paper. The solver is `featherweight.kernels.ptqtp`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.codes import Code
from featherweight.codes.base import dtype_name, groups_of
from featherweight.codes.trit_planes import TRITS_A_BYTE, TritPlanes
from featherweight.kernels.ptqtp import TritPlaneSettings, TritPlaneStream, assign_trits, solve_trit_planes
from featherweight.kernels.ptqtp_settings import split_codes
from featherweight.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource
from featherweight.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.registry import register

WINDOW_MULTIPLE = 20  # rows: whole bytes of both packings (5 and 4 trits) at any width


@register("grid", "trit-planes")
class TritPlaneGrid(Grid):
    """K ternary planes with free or tied scales, fitted by alternating least squares (see the module)."""

    planes: int = Field(2, ge=1, le=3, description="ternary planes K; a weight takes one of 3^K values")
    tied: bool = Field(False, description="one scale s a group, plane scales 3^(K-1) s ... s, found by a sweep")
    packing: Literal["base3", "2bit"] = Field("base3", description="five trits a byte (1.6 bits) or four (2 bits)")
    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")
    tolerance: float = Field(1e-4, ge=0, description="stop when no group of the matrix moves its scales by this")
    tolerance_relative: bool = Field(False, description="tolerance is a share of the matrix's largest |weight|")
    max_iterations: int = Field(50, ge=1, le=62, description="iterations at most (T_max)")
    ridge: float = Field(1e-8, gt=0, le=1, description="initial ridge lambda")
    condition_threshold: float = Field(1e12, gt=1, description="condition number from which lambda grows")
    tie_order: Literal["lexicographic", "paired"] = Field("lexicographic", description="order of equally near trits")
    starts: int = Field(1, ge=1, le=3, description="1 published; 2 also greedy residual; 3 also the other tie order")
    closing: bool = Field(False, description="a last trit step against the scales as stored")
    final_least_squares: bool = Field(False, description="a last scale solve for the final trits")

    def solver_settings(self, largest: float = 1.0) -> TritPlaneSettings:
        """`largest` is the matrix's largest |weight|, the unit of a relative tolerance."""
        return TritPlaneSettings(
            planes=self.planes,
            group_size=self.group_size,
            tied=self.stored_tied,
            tolerance=self.tolerance * (largest if self.tolerance_relative else 1.0),
            max_iterations=self.max_iterations,
            ridge=self.ridge,
            condition_threshold=self.condition_threshold,
            tie_order=self.tie_order,
            starts=self.starts,
            closing=self.closing,
            final_least_squares=self.final_least_squares,
        )

    @property
    def stored_tied(self) -> bool:
        """One tied plane is one free plane, and is stored as such."""
        return self.tied and self.planes > 1

    def fit(self, weight: Tensor) -> Fit:
        largest = HeldWeight(weight).largest
        dtype = scale_dtype_for(self.scale_dtype, largest)
        scales = solve_trit_planes(weight, self.solver_settings(largest), scale_dtype=dtype).scales.to(dtype)
        return {"scales": scales}

    def levels(self, fit: Fit) -> Tensor:
        scales = fit["scales"].float()
        if self.stored_tied:
            half = (3**self.planes - 1) // 2
            return scales.unsqueeze(-1) * torch.arange(-half, half + 1)
        trits = split_codes(torch.arange(3**self.planes, dtype=torch.uint8), self.planes).float()  # [K, 3^K]
        return (scales @ trits).sort(-1).values

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        codes = assign_trits(weight, fit["scales"].double(), self.solver_settings())
        trits = split_codes(codes, self.planes)
        return TritPlanes.encode(
            trits, fit["scales"], self.group_size, self.stored_tied, self.packing, fit["scales"].dtype
        )

    def quantize(self, weight: Tensor) -> Code:
        return self.quantize_source(HeldWeight(weight), SolveOptions())

    def quantize_source(self, source: WeightSource, options: SolveOptions) -> Code:
        rows, columns = source.shape
        stream = TritPlaneStream(
            rows,
            columns,
            self.solver_settings(source.largest),
            scale_dtype=scale_dtype_for(self.scale_dtype, source.largest),
            packing=self.packing,
            threads=options.threads,
            backend=options.backend,
        )
        step = options.window_rows(source.shape, source.dtype.itemsize, WINDOW_MULTIPLE)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            stream.add(first, source.rows(first, last))
            source.release(first, last)
        trits, scales = stream.finish(source.rows)
        source.release(0, rows)
        return TritPlanes(trits, scales, source.shape, self.group_size, self.stored_tied, self.packing)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "trit-planes",
            "shape": list(shape),
            "planes": self.planes,
            "tied": self.stored_tied,
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = min(rows, options.window_rows(shape, 2, WINDOW_MULTIPLE)) * columns
        packed = self.planes * -(-rows * columns // TRITS_A_BYTE[self.packing])
        groups = rows * groups_of(columns, self.group_size)
        # a window in float32 and as codes, the packed planes, scales in float64, a step count a group
        return 5 * window + packed + groups * (8 * self.planes + 1)
