"""Non-uniform values: a codebook (lookup table) per row or group, by weighted one-dimensional k-means.

SqueezeLLM (arXiv 2306.07629), eq. 4-5: minimise sum_j F_ij (w_ij - c)^2 with F the diagonal of the empirical Fisher
information (`fisher`), or the mean squared input of the column (`gram`), or nothing (`none`). Each row is sorted once;
with running sums a Lloyd iteration costs a binary search per centroid. `exact` finds the global optimum by dynamic
programming over the sorted values (divide and conquer, O(2^bits n log n) a row), which the paper does not. Weights that
are exactly zero, as those a sparse part has taken out, do not enter the fit (`ignore_zeros`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Fit
from featherweight.methods.quantize.kmeans import density_start, exact_centroids, lloyd, plus_plus_start, quantile_start
from featherweight.methods.quantize.row_grid import RowGrid, grouped
from featherweight.methods.quantize.sorted_groups import SortedGroups
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.codebook import Codebook

WHOLE_ROW = 1 << 30


@register("grid", "codebook")
class CodebookGrid(RowGrid):
    """2^bits free values a row, by k-means (see the module)."""

    portable: ClassVar[bool] = True
    group_size: int = Field(WHOLE_ROW, ge=1, le=WHOLE_ROW, description="input columns that share a codebook")
    bits: int = Field(4, ge=1, le=8, description="bits a weight; 2^bits values")
    weighting: Literal["none", "fisher", "gram"] = Field("none", description="what squared errors are weighted with")
    start: Literal["k-means++", "quantiles", "density"] = Field("k-means++", description="rule for the first centroids")
    exact: bool = Field(False, description="global optimum by dynamic programming, slower, instead of Lloyd iterations")
    max_iterations: int = Field(50, ge=0, description="Lloyd iterations at most")
    ignore_zeros: bool = Field(True, description="weights that are exactly zero do not enter the fit")
    seed: int = Field(0, ge=0, description="seed of the k-means++ start; every row draws the same numbers")

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.weighting == "none" else (self.weighting,)

    def fit_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Fit:
        values, mask = grouped(weight.double(), self.group_size)
        weights = self._weights(weight, statistics) * mask
        if self.ignore_zeros:
            weights = weights * (values != 0)
        # a group whose weights are all zero is fitted with equal ones
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, mask.double())
        groups = SortedGroups(values.flatten(0, 1), weights.flatten(0, 1))
        return {"codebooks": self._centroids(groups).view(*values.shape[:2], -1).to(dtype)}

    def _weights(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Weights of squared errors, broadcasting to [out, groups, size], zero in the padding."""
        if self.weighting == "fisher" and "fisher" in statistics:
            known = statistics["fisher"].double()
        elif self.weighting == "gram" and "gram" in statistics:
            known = statistics["gram"].diagonal().double().unsqueeze(0)
        else:
            known = torch.ones(1, weight.shape[1], dtype=torch.float64, device=weight.device)
        usable = torch.where(known.isfinite(), known, 0.0).clamp(min=0)
        return grouped(usable, self.group_size)[0].expand(weight.shape[0], -1, -1)

    def _centroids(self, groups: SortedGroups) -> Tensor:
        count = 1 << self.bits
        if self.exact:
            return exact_centroids(groups, count)
        if self.start == "quantiles":
            first = quantile_start(groups, count)
        elif self.start == "density":
            first = density_start(groups, count)
        else:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
            first = plus_plus_start(groups, draws.to(groups.mass.device))
        return lloyd(groups, first, self.max_iterations)

    def levels(self, fit: Fit) -> Tensor:
        return fit["codebooks"].float()

    def level_count(self) -> int:
        return 1 << self.bits

    def _stored_group_size(self, columns: int) -> int | None:
        return None if self.group_size >= columns else self.group_size

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        books = fit["codebooks"]
        return Codebook.encode(indices, books, self._stored_group_size(indices.shape[1]), books.dtype)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        size = self._stored_group_size(shape[1])
        return {
            "kind": "codebook",
            "shape": list(shape),
            "bits": self.bits,
            **({} if size is None else {"group_size": size}),
            "codebook_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }
