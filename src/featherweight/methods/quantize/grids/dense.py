"""No quantisation: the weight in a floating-point type. Useful in overrides, to keep single layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import DTYPES
from featherweight.storage.codes.dense import Dense


@register("grid", "dense")
class DenseGrid(Grid):
    """Every value of a floating-point type."""

    portable: ClassVar[bool] = True
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="stored type")

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        return {}

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        stored = weight.to(DTYPES[self.dtype])
        if not torch.isfinite(stored).all():
            raise ValueError(f"the weight does not fit in {self.dtype}; use dtype: bfloat16 or float32")
        return Dense(stored.cpu())

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {"kind": "dense", "shape": list(shape), "dtype": self.dtype}
