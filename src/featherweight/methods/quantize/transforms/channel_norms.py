"""Input channels scaled by the size of what goes through them: step 1 of BitStack, without a search.

BitStack (arXiv 2410.23918): s_j = the norm over tokens of channel j + 1e-3, W <- W diag(s), and the input is divided by
s. The code keeps 1 / s as column scales, so that every layer can be scaled, also where no tensor before could take the
division up (grouped queries); a vector of float16 is what that costs.

Departures: the norm is that over all calibration tokens; the paper's is the mean over sequences of their norms, which
is the same but for how much sequences differ in loudness. Scales are divided by their geometric mean, which changes
nothing but keeps factors in float16's range; 1e-3 beside a norm over 2048 tokens is `floor` beside a root mean square.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import LayerTransform, Transform
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.methods.quantize.transforms.identity import Identity
from featherweight.registry import register
from featherweight.storage.codes import code_layout

SPREAD = 2.0**13
"""Scales lie within so many times their geometric mean, so that they are normal numbers of float16."""


@register("transform", "channel-norms")
class ChannelNorms(Transform):
    """Columns of the weight times the root mean square of their input; nothing where that is not known."""

    portable: ClassVar[bool] = True
    floor: float = Field(2.2e-5, ge=0, description="added to each root mean square, so that no channel vanishes")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("mean_square",)

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        spec = {"kind": "column-scaled", "shape": list(shape), "inner": {"kind": "dense", "dtype": "float16"}}
        return code_layout(spec)["column_scales"].nbytes

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        squares = statistics.get("mean_square")
        return Identity() if squares is None else ColumnScale(scales_of(squares, self.floor))


def scales_of(squares: Tensor, floor: float = 0.0) -> Tensor:
    """Scales float64 [in] with geometric mean 1 from mean squares [in]; 1 where nothing is known."""
    sizes = squares.detach().cpu().double().clamp(min=0).sqrt() + floor
    known = sizes.isfinite() & (sizes > 0)
    if not bool(known.any()):
        return torch.ones_like(sizes)
    middle = sizes[known].log().mean().exp()
    return torch.where(known, sizes / middle, 1.0).clamp(1 / SPREAD, SPREAD)
