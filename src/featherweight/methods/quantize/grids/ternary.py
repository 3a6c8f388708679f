"""One symmetric ternary plane, {-s, 0, s} a group: the data-free baselines.

`twn`: Ternary Weight Networks (arXiv 1605.04711): threshold 0.75 mean |w|, s the mean |w| above it. `absmean`: BitNet
b1.58 (arXiv 2402.17764): s = mean |w|; there per tensor while training, here per group after it. `optimal`: the s of
least squared error, by trying all thresholds over the sorted |w| (least squares of the k largest, best k).

Weights then go to the nearest of the three values, so TWN's threshold only sets its scale.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Fit
from featherweight.methods.quantize.row_grid import RowGrid, grouped
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.trit_planes import TritPlanes

TWN_THRESHOLD = 0.75  # of the mean |w|


@register("grid", "ternary")
class TernaryGrid(RowGrid):
    """{-s, 0, s} with a closed-form scale a group (see the module)."""

    portable: ClassVar[bool] = True
    scaling: Literal["twn", "absmean", "optimal"] = Field("twn", description="rule for the scale of a group")
    packing: Literal["base3", "2bit"] = Field("base3", description="five trits a byte (1.6 bits) or four (2 bits)")

    def fit_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Fit:
        magnitudes, mask = grouped(weight.double().abs(), self.group_size)
        scale = {"twn": twn_scale, "absmean": absmean_scale, "optimal": optimal_scale}[self.scaling]
        return {"scales": scale(magnitudes, mask.sum(-1)).to(dtype).unsqueeze(-1)}

    def solve_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> tuple[Fit, Tensor]:
        fit = self.fit_rows(weight, dtype, statistics)
        return fit, self._indices(weight, fit)

    def _indices(self, weight: Tensor, fit: Fit) -> Tensor:
        """Nearest levels; |w| = s / 2 goes to zero on both sides, as in BitNet's rounding."""
        rows, columns = weight.shape
        values, _ = grouped(weight, self.group_size)
        trits = values.sign() * (2 * values.abs() > fit["scales"].float())
        return (trits + 1).to(torch.uint8).view(rows, -1)[:, :columns].contiguous()

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        return self.encode(self._indices(weight, fit), fit)

    def levels(self, fit: Fit) -> Tensor:
        return fit["scales"].float() * torch.tensor([-1.0, 0.0, 1.0], device=fit["scales"].device)

    def level_count(self) -> int:
        return 3

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        trits = (indices.to(torch.int8) - 1).unsqueeze(0)
        scales = fit["scales"]
        return TritPlanes.encode(trits, scales, self.group_size, packing=self.packing, scale_dtype=scales.dtype)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "trit-planes",
            "shape": list(shape),
            "planes": 1,
            "tied": False,
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }


def absmean_scale(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Mean |w| of groups [..., groups, size], of which the first `sizes` [groups] entries count: [..., groups]."""
    return magnitudes.sum(-1) / sizes


def twn_scale(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the |w| above 0.75 mean |w|."""
    above = magnitudes > TWN_THRESHOLD * absmean_scale(magnitudes, sizes).unsqueeze(-1)
    return (magnitudes * above).sum(-1) / above.sum(-1).clamp(min=1)


def optimal_scale(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """The s that leaves least squared error: sum of the k largest |w| over k, for the k with the largest sum^2 / k."""
    sums = magnitudes.sort(dim=-1, descending=True).values.cumsum(-1)
    means = sums / torch.arange(1, magnitudes.shape[-1] + 1, device=sums.device)
    best = (sums * means).argmax(-1, keepdim=True)  # padding is zero, sorts last, and only lowers sum^2 / k
    return means.gather(-1, best).squeeze(-1)
