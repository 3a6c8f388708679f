"""HGF, Hybrid Gated Flow (arXiv 2602.05269): a reconstruction from its abstract and public overviews.

Beside the ternary product a low-rank one, y = x Q^T + g (x A^T) B^T, with a scalar gate g for each layer that is
trained: sigmoid or tanh of a parameter that begins where g is 0.1. A begins normal with deviation 1 / sqrt(in), B at 0
(never both at 0: nothing would have a gradient), or both with the best approximation of what rounding leaves (`start:
svd`). The gate's strength rises over the first steps, it has its own factor of the learning rate, and after `freeze` it
stays. What is stored is a sum: the code, and (g B) A as a low-rank term, whose factors are rounded to their stored type
in training as well. With integer inputs the low-rank product takes the rounded ones, as a folder holds one rule for a
layer's input; the paper's takes them unrounded. Differential attention, part of the paper's full model, is not here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from featherweight.methods.train.base import Given, Layer, Rounded, Side, straight
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sum import Sum

RIGHT, LEFT, GATE = "side_right", "side_left", "side_gate"


@register("side", "hgf")
class GatedLowRank(Side):
    """A gated product of low rank beside the rounded one (see the module)."""

    rank: int | None = Field(None, ge=1, description="of the added matrix; none: a 128th of the inputs, at least 1")
    gate: Literal["sigmoid", "tanh"] = Field("sigmoid", description="function of the gate's parameter")
    start_gate: float = Field(0.1, gt=0, lt=1, description="the gate at the beginning")
    start: Literal["zero", "svd"] = Field("zero", description="left factor 0, or the best fit to the rounding error")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps over which the gate's strength rises")
    freeze: float = Field(0.8, gt=0, le=1, description="share of the steps after which the gate stays; 1: never")
    rate: float = Field(1.0, gt=0, description="factor of the learning rate for gates")
    penalty_weight: float = Field(0.0, ge=0, description="times the sum of squared gates is added to the loss")
    factor_dtype: Literal["float16", "float32"] = Field("float16", description="type in which factors are stored")
    seed: int = Field(0, description="of the right factor")

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """For a matrix [out, in]."""
        return min(self.rank or max(1, shape[1] // 128), *shape)

    def given(self, weight: Tensor, found: Rounded) -> Given:
        rows, columns = weight.shape
        rank = self.rank_of((rows, columns))
        gate = math.atanh(self.start_gate) if self.gate == "tanh" else math.log(self.start_gate / (1 - self.start_gate))
        if self.start == "svd":
            outer, sizes, inner = torch.linalg.svd((weight.detach() - found.value).double(), full_matrices=False)
            root = sizes[:rank].sqrt()
            left, right = outer[:, :rank] * root / self.start_gate, root[:, None] * inner[:rank]
        else:
            generator = torch.Generator().manual_seed(self.seed)
            right = torch.randn(rank, columns, generator=generator, dtype=torch.float64, device="cpu") / columns**0.5
            left = torch.zeros(rows, rank, dtype=torch.float64, device="cpu")
        first = {RIGHT: right, LEFT: left, GATE: torch.tensor(gate, dtype=torch.float64, device="cpu")}
        return {name: nn.Parameter(value.to(weight.dtype).contiguous()) for name, value in first.items()}

    def value_of(self, layer: Layer) -> Tensor:
        """The gate, before its strength rises."""
        parameter: Tensor = layer.own(GATE)
        return torch.tanh(parameter) if self.gate == "tanh" else torch.sigmoid(parameter)

    def strength(self, progress: float) -> float:
        """Of the gate at this share of the training."""
        return min(1.0, progress / self.warmup) if self.warmup else 1.0

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Left [out, rank], with the gate, and right [rank, in], as they are stored; differentiable."""
        left = self.strength(layer.clock.progress) * self.value_of(layer) * layer.own(LEFT)
        kept = torch.float16 if self.factor_dtype == "float16" else torch.float32
        return tuple(straight(x, x.detach().to(kept).to(x.dtype)) for x in (left, layer.own(RIGHT)))  # type: ignore[return-value]

    def added(self, layer: Layer, inputs: Tensor) -> Tensor:
        left, right = (factor.to(inputs.dtype) for factor in self.factors(layer))
        return F.linear(F.linear(inputs, right), left)

    def penalty(self, layer: Layer) -> Tensor | None:
        return self.penalty_weight * self.value_of(layer).square() if self.penalty_weight else None

    def ticked(self, layer: Layer) -> None:
        gate = layer.own(GATE)
        gate.requires_grad_(self.freeze == 1 or layer.clock.progress < self.freeze or layer.clock.steps == 0)
        if not gate.requires_grad:
            gate.grad = None

    def rates(self) -> dict[str, float]:
        return {GATE: self.rate}

    def stored(self, layer: Layer, code: Code) -> Code:
        left, right = (factor.detach().float().cpu() for factor in self.factors(layer))
        kept = torch.float16 if self.factor_dtype == "float16" else torch.float32
        return Sum.of(code, LowRank.encode(left, right, kept))
