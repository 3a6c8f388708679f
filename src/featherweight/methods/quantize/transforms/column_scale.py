"""Scaling of input channels: what activation-aware methods put into a code where no tensor before can absorb it.

T x = x / s, W T^-1 = W diag(s) (AWQ, arXiv 2306.00978). The code keeps c = 1 / s, rounded to what is stored, and s is
taken to be 1 / c exactly, so that rounding c costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, carried
from featherweight.storage.codes import Code
from featherweight.storage.codes.column_scaled import ColumnScaled

SMALLEST, LARGEST = 2.0**-14, 65504.0  # normal numbers of float16


class ColumnScale:
    """A `LayerTransform` that multiplies the columns of the weight by `scales` [in], positive and finite.

    `inverse` and `scales` are in main memory.

    dtype : of the stored 1 / scales; None: float16, or float32 where these are not normal numbers of float16
    ValueError for other scales.
    """

    portable = True

    def __init__(self, scales: Tensor, dtype: torch.dtype | None = None) -> None:
        inverse = 1 / scales.detach().cpu().double()
        if not bool((torch.isfinite(inverse) & (inverse > 0) & (inverse < torch.inf)).all()):
            raise ValueError("column scales must be positive and finite")
        if dtype is None:
            fits = bool(((inverse >= SMALLEST) & (inverse <= LARGEST)).all())
            dtype = torch.float16 if fits else torch.float32
        self.inverse = inverse.to(dtype)
        if not bool((torch.isfinite(self.inverse) & (self.inverse > 0)).all()):
            raise ValueError(
                f"1 / column scales, {float(inverse.min()):.3g} to {float(inverse.max()):.3g}, overflow {dtype}"
            )

    @property
    def scales(self) -> Tensor:
        """float64 [in]: what the columns are multiplied by, exactly 1 / `inverse`."""
        return 1 / self.inverse.double()

    @property
    def key(self) -> tuple[str, bytes]:
        return "column-scale", self.inverse.contiguous().view(torch.uint8).numpy().tobytes()

    def apply(self, weight: Tensor) -> Tensor:
        return weight * self.scales.to(weight.device, weight.dtype)

    def invert(self, weight: Tensor) -> Tensor:
        return weight * self.inverse.to(weight.device, weight.dtype)

    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs * self.inverse.to(inputs.device, inputs.dtype)

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        """All of them: gradients with respect to the scaled weights are those of the weights divided by the scales."""
        return carried(
            statistics,
            self.inputs,
            self.apply,
            mean_abs=self.inputs,
            mean_square=lambda squares: self.inputs(self.inputs(squares)),
            fisher=lambda fisher: fisher * self.inverse.to(fisher.device, fisher.dtype).square(),
        )

    def wrap(self, code: Code) -> Code:
        return ColumnScaled(code, self.inverse)
