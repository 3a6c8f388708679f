"""3:4 ternary weights: in every quartet one zero and three of +-scale, 1.25 bits and the scales.

Sherry (arXiv 2601.07892): its grid, not its training. With equal importances the fit is its sparse-absmean quantiser,
which is optimal: the smallest of each quartet is zeroed and the scale is the mean of what is kept. With importances
(mean squared inputs) it is the post-training encoder of llama.cpp's proposed type STQ1_0: alternately the weighted
least-squares scale and the lane whose zeroing costs least.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource, in_main_memory
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.methods.quantize.windows import WINDOW_MULTIPLE, quantize_windows
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name, groups_of
from featherweight.storage.codes.sherry import Sherry, quartet_codes, to_quartets, trits_of


@register("grid", "sherry")
class SherryGrid(Grid):
    """One zero and three of +-scale in every four weights (see the module)."""

    portable: ClassVar[bool] = True
    lane_stride: Literal[1, 16] = Field(1, description="columns between the four weights: 1 as published, 16 as STQ1_0")
    importance: Literal["none", "activations"] = Field("none", description="weight errors by the mean squared input")
    rounds: int = Field(3, ge=1, le=50, description="alternations of scale and zero lane")
    scale_dtype: ScaleDtype = Field("auto", description="auto: float16, float32 where float16 would over- or underflow")

    @field_validator("group_size")
    @classmethod
    def _whole_quartets(cls, value: int) -> int:
        if value % 4:
            raise ValueError("a group must hold whole quartets, a multiple of 4")
        return value

    @field_validator("lane_stride")
    @classmethod
    def _whole_spans(cls, value: int, info: Any) -> int:
        if info.data.get("group_size", 64) % (4 * value):
            raise ValueError("with this stride of lanes group_size must be a multiple of 64")
        return value

    @property
    def columns_jointly(self) -> int:
        return 4 * self.lane_stride

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.importance == "activations" else ()

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        return self._fit(weight, statistics, scale_dtype_for(self.scale_dtype, HeldWeight(weight).largest))

    def _fit(self, weight: Tensor, statistics: Statistics, dtype: torch.dtype) -> Fit:
        columns = weight.shape[1]
        sizes = self._grouped(weight.double().abs())
        importance = self._grouped(self._importance(columns, statistics, weight.device).unsqueeze(0))
        scales = (sizes * importance).sum((2, 3)) / importance.sum((2, 3))
        for _ in range(self.rounds):
            kept = importance * self._kept(sizes, scales[:, :, None, None], importance)
            scales = (sizes * kept).sum((2, 3)) / kept.sum((2, 3)).where(kept.sum((2, 3)) > 0, 1.0)
        return {"scales": scales.to(dtype)}

    def _importance(self, columns: int, statistics: Statistics, device: torch.device) -> Tensor:
        """float64 [in], positive."""
        if self.importance == "none" or "gram" not in statistics:
            return torch.ones(columns, dtype=torch.float64, device=device)
        squares = statistics["gram"].diagonal().double().clamp(min=0)
        mean = float(squares.mean())
        return squares / mean + 1e-6 if 0 < mean < float("inf") else torch.ones_like(squares)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[rows, groups, quartets, 4], padded with zeros."""
        rows, columns = matrix.shape
        size = self._size(columns)
        padded = torch.nn.functional.pad(matrix, (0, -columns % size))
        return to_quartets(padded, self.lane_stride).view(rows, -1, size // 4, 4)

    def _size(self, columns: int) -> int:
        """Padded columns of a group."""
        span = self.columns_jointly
        return min(self.group_size, -(-columns // span) * span)

    @staticmethod
    def _kept(sizes: Tensor, scales: Tensor, importance: Tensor) -> Tensor:
        """float64, 0 at the lane of each quartet whose zeroing costs least (the first in a tie), 1 elsewhere.

        Padding has no importance in the scale, but is zeroed like any weight of size 0.
        """
        cost = (2 * sizes - scales) * importance.where(importance > 0, 1.0)
        return 1 - torch.zeros_like(cost).scatter_(-1, cost.argmin(-1, keepdim=True), 1.0)

    def round_vectors(
        self, weight: Tensor, first: int, fit: Fit, statistics: Statistics = NO_STATISTICS
    ) -> tuple[Tensor, Fit]:
        scales = fit["scales"][:, first // self.group_size, None]
        codes = self._codes(weight, scales, statistics)
        trits = trits_of(codes, weight.shape[1], self.lane_stride)
        return trits.float() * scales.float(), {"codes": codes}

    def _codes(self, weight: Tensor, scales: Tensor, statistics: Statistics) -> Tensor:
        """Joint codes uint8 [out, quartets] for stored scales [out, groups] that cover the columns."""
        rows, columns = weight.shape
        known = min(columns, statistics["gram"].shape[0]) if "gram" in statistics else columns
        importance = self._grouped(self._importance(known, statistics, weight.device).unsqueeze(0))
        sizes = self._grouped(weight.double().abs())
        if importance.shape[1:] != sizes.shape[1:]:  # a padded window; the statistics end before it
            importance = torch.nn.functional.pad(importance.flatten(1), (0, sizes[0].numel() - importance.numel()))
            importance = importance.view(1, *sizes.shape[1:])
        kept = self._kept(sizes, scales.double()[:, :, None, None], importance)
        signs = torch.where(self._grouped(weight) < 0, -1, 1)
        count = -(-columns // self.columns_jointly) * self.lane_stride
        return quartet_codes(signs * kept.long()).view(rows, -1)[:, :count].contiguous()

    def join_vectors(self, parts: Fit, fit: Fit, shape: tuple[int, int]) -> Code:
        return Sherry.encode(parts["codes"], fit["scales"], shape, self.group_size, self.lane_stride)

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        return self.quantize_source(HeldWeight(weight), SolveOptions(), statistics)

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        dtype = scale_dtype_for(self.scale_dtype, source.largest)

        def one(window: Tensor) -> Code:
            fit = self._fit(window, statistics, dtype)
            codes = self._codes(window, fit["scales"], statistics)
            shape = (window.shape[0], window.shape[1])
            return self.join_vectors({"codes": codes.cpu()}, in_main_memory(fit), shape)

        return quantize_windows(source, options, one)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "sherry",
            "shape": list(shape),
            "group_size": self.group_size,
            "lane_stride": self.lane_stride,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = min(rows, options.window_rows(shape, 4, WINDOW_MULTIPLE)) * (columns + self.columns_jointly)
        stored = rows * (5 * columns // 32 + 16 * self.lane_stride + 4 * groups_of(columns, self.group_size))
        return 64 * window + 2 * stored  # eight float64 copies of a window, and the result twice while it is joined
