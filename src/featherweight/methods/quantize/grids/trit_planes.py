"""Trit-planes fitted by PTQTP: W = sum of K ternary planes with a scale each per group.

Post-Training Quantization to Trit-Planes for Large Language Models (arXiv 2509.16989): scales by 2x2 ridge
regression, trits by exhaustive search over the 3^K combinations, alternating to convergence. With the default
settings this is the published algorithm; it needs nothing but the weights. `tied`, `starts`, `closing`,
`final_least_squares` and K other than 2 are not in the paper. The solver is `featherweight.native.ptqtp`.

Not in the paper either: `fitting: weighted` (least squares weighted by the second moment of the inputs, for sweeps),
planes tied 3 to 2, and scales of 8 bits on a logarithmic grid: a group of 32 with one costs what 128 with two fp16 do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource, in_main_memory
from featherweight.methods.quantize.scales import scale_dtype_for
from featherweight.methods.quantize.trit_fit import fit_scales
from featherweight.native.packing import packed_bytes
from featherweight.native.ptqtp import TritPlaneSettings, TritPlaneStream, assign_trits, solve_trit_planes
from featherweight.native.ptqtp_settings import split_codes
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import groups_of
from featherweight.storage.codes.trit_planes import (
    LOG8,
    TritPlanes,
    log8_reaches,
    log8_rounded,
    tied_weights,
)

WINDOW_MULTIPLE = 20  # rows: whole bytes of both packings (5 and 4 trits) at any width


@register("grid", "trit-planes")
class TritPlaneGrid(Grid):
    """K ternary planes with free or tied scales, fitted by alternating least squares (see the module)."""

    portable: ClassVar[bool] = True
    device_weight_bytes: ClassVar[int] = 80  # the loop works in float64, on sorted groups and their prefix sums
    planes: int = Field(2, ge=1, le=3, description="ternary planes K; a weight takes one of 3^K values")
    tied: bool = Field(False, description="one scale s a group, plane scales 3^(K-1) s ... s, found by a sweep")
    tied_ratio: Literal["3:1", "3:2"] = Field("3:1", description="of two tied planes: nine even levels, or 0 1 2 3 5")
    packing: Literal["base3", "2bit"] = Field("base3", description="five trits a byte (1.6 bits) or four (2 bits)")
    scale_dtype: Literal["auto", "float16", "float32", "log8"] = Field(
        "auto",
        description="auto: float16, float32 where it would over- or underflow; log8: a byte, 32 steps to a factor 2, "
        "floats where the groups of a matrix differ by more than 240 times",
    )
    fitting: Literal["ptqtp", "weighted"] = Field(
        "ptqtp", description="as published, or least squares weighted by the inputs' second moment"
    )
    tolerance: float = Field(1e-4, ge=0, description="stop when no group of the matrix moves its scales by this")
    tolerance_relative: bool = Field(False, description="tolerance is a share of the matrix's largest |weight|")
    max_iterations: int = Field(50, ge=1, le=62, description="iterations at most (T_max)")
    ridge: float = Field(1e-8, gt=0, le=1, description="initial ridge lambda")
    condition_threshold: float = Field(1e12, gt=1, description="condition number from which lambda grows")
    tie_order: Literal["lexicographic", "paired"] = Field("lexicographic", description="order of equally near trits")
    starts: int = Field(1, ge=1, le=3, description="1 published; 2 also greedy residual; 3 also the other tie order")
    closing: bool = Field(False, description="a last trit step against the scales as stored")
    final_least_squares: bool = Field(False, description="a last scale solve for the final trits")

    @model_validator(mode="after")
    def _possible(self) -> TritPlaneGrid:
        if self.tied_ratio == "3:2" and not (self.tied and self.planes == 2):
            raise ValueError("tied_ratio 3:2 is for two tied planes: set tied: true and planes: 2")
        if self.tied_ratio == "3:2" and self.fitting == "ptqtp":
            raise ValueError("planes tied 3:2 are fitted with fitting: weighted")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.fitting == "weighted" else ()

    @property
    def plane_weights(self) -> tuple[int, ...] | None:
        """Weights of tied planes that are not powers of three."""
        return (3, 2) if self.tied_ratio == "3:2" else None

    @property
    def basis(self) -> Tensor:
        """float32 [P, 3^K]: the value of joint code c, first plane first, is sum_p scales[p] basis[p, c]."""
        trits = split_codes(torch.arange(3**self.planes, dtype=torch.uint8, device="cpu"), self.planes).float()
        if not self.stored_tied:
            return trits
        weights = self.plane_weights or tied_weights(self.planes)
        return torch.tensor(weights, dtype=torch.float32, device="cpu").unsqueeze(0) @ trits

    @property
    def _plain(self) -> bool:
        """Whether the published solver gives what is stored."""
        return self.fitting == "ptqtp" and self.scale_dtype != LOG8

    def rounded(self, scales: Tensor, largest: float = 1.0) -> Tensor:
        """Scales as they will be stored, for a matrix with this largest |weight|; log8: their values in float32."""
        if self.scale_dtype == LOG8:
            return log8_rounded(scales)
        return scales.to(self._dtype(largest))

    def _dtype(self, largest: float) -> torch.dtype:
        """In which scales are held; log8 ones as float32."""
        return torch.float32 if self.scale_dtype == "log8" else scale_dtype_for(self.scale_dtype, largest)

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

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        largest = HeldWeight(weight).largest
        if self.fitting == "weighted":
            gram = statistics.get("gram")
            plain = torch.ones(weight.shape[1], device=weight.device)
            importance = plain if gram is None else gram.diagonal().clamp_min(0)
            scales = fit_scales(weight, importance, self.basis.to(weight.device), self.group_size)
            scales = scales.squeeze(-1) if self.stored_tied else scales
            return {"scales": self.rounded(scales, largest)}
        dtype = self._dtype(largest)
        scales = solve_trit_planes(weight, self.solver_settings(largest), scale_dtype=dtype).scales
        return {"scales": self.rounded(scales, largest)}

    def levels(self, fit: Fit) -> Tensor:
        return self._combinations(fit).sort(dim=-1, stable=True).values

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        if not self._plain:
            return super().nearest(weight, fit)
        codes = assign_trits(weight, fit["scales"].double(), self.solver_settings())
        return self.assemble(split_codes(codes.cpu(), self.planes), in_main_memory(fit))

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        rows, columns = indices.shape
        values = self._combinations(fit)  # [out, groups, 3^K]
        joint = values.argsort(dim=-1, stable=True).to(torch.uint8)  # the combination at each level
        groups = joint.shape[1]
        size = min(self.group_size, columns)
        padded = torch.nn.functional.pad(indices, (0, groups * size - columns)).view(rows, groups, size)
        codes = joint.gather(-1, padded.long()).view(rows, -1)[:, :columns]
        return self.assemble(split_codes(codes.contiguous(), self.planes), fit)

    def assemble(self, trits: Tensor, fit: Fit) -> TritPlanes:
        """The code of trits int8 [K, out, in] with the scales of a fit.

        Scales of a matrix whose groups differ by more than a byte can tell (256 times) are stored as floats.
        """
        scales = fit["scales"]
        stored: torch.dtype | str = scales.dtype
        if self.scale_dtype == LOG8:
            largest = float(scales.max()) if scales.numel() else 0.0
            wide = torch.float16 if 2.0**-6 <= largest <= 6e4 else torch.float32
            stored = LOG8 if log8_reaches(scales) else wide
        return TritPlanes.encode(
            trits, fit["scales"], self.group_size, tied=self.stored_tied, packing=self.packing, scale_dtype=stored,
            weights=self.plane_weights,
        )  # fmt: skip

    def _combinations(self, fit: Fit) -> Tensor:
        """The value of every joint code 0 .. 3^K - 1: float32 [out, groups, 3^K]."""
        scales = fit["scales"].float()
        return (scales.unsqueeze(-1) if self.stored_tied else scales) @ self.basis.to(scales.device)

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        if not self._plain:
            return super().quantize(weight, statistics)
        return self.quantize_source(HeldWeight(weight), SolveOptions())

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        rows, columns = source.shape
        if not self._plain:
            return super().quantize_source(source, options, statistics)
        stream = TritPlaneStream(
            rows,
            columns,
            self.solver_settings(source.largest),
            scale_dtype=self._dtype(source.largest),
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
        dtype = LOG8 if self.scale_dtype == LOG8 else "float32" if self.scale_dtype == "float32" else "float16"
        spec = {
            "kind": "trit-planes",
            "shape": list(shape),
            "planes": self.planes,
            "tied": self.stored_tied,
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype,
        }
        return spec if self.plane_weights is None else spec | {"weights": list(self.plane_weights)}

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        if not self._plain:
            return super().working_bytes(shape, options) + 32 * rows * columns
        window = min(rows, options.window_rows(shape, 2, WINDOW_MULTIPLE)) * columns
        packed = self.planes * packed_bytes(rows * columns, self.packing)
        groups = rows * groups_of(columns, self.group_size)
        # a window in float32 and as codes, the packed planes, scales in float64, a step count a group
        return 5 * window + packed + groups * (8 * self.planes + 1)
