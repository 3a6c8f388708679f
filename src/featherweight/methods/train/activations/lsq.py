"""Inputs of OFQ (arXiv 2302.02210): learned scales, one a position, and learned biases before and after the rounding.

s round(clip(x / s, -Q_n, Q_p)) with Q_n = 2^(b-1) and Q_p = 2^(b-1) - 1; behind a softmax or an activation function 0
and 2^b - 1; of 1 bit s sign(x). Gradients are those of LSQ (methods/train/inputs.py), the factor of each scale
1 / sqrt(Q_p x inputs with this scale). Scales begin, at the first batch, at 2 mean|x| / sqrt(Q_p), unsigned at 4 of
that, biases at zero. A scale for each position is for inputs of one length, as a vision transformer has them. No folder
can hold such a layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.train.activations.elastic import BEGUN
from featherweight.methods.train.base import Activation, Given, Layer, matches
from featherweight.methods.train.inputs import few_levels
from featherweight.methods.train.scopes import SMALLEST
from featherweight.registry import register

SCALES, BEFORE, AFTER = "input_scales", "input_bias_before", "input_bias_after"


@register("activation", "lsq")
class SteppedInputs(Activation):
    """b bits, with learned scales of positions, channels or the tensor (see the module)."""

    bits: int = Field(2, ge=1, le=8, description="of an input")
    scale: Literal["position", "channel", "tensor"] = Field("position", description="what has a scale of its own")
    channels: tuple[str, ...] = Field(("value",), description="patterns of inputs with a scale a channel in any case")
    unsigned: tuple[str, ...] = Field(
        ("fc2", "*[0-9].output.dense", "probabilities"),
        description="patterns of inputs without a sign: those behind a softmax or an activation function",
    )
    biases: bool = Field(True, description="learned vectors, a number a channel, added before and after the rounding")

    @property
    def unstorable(self) -> str:
        return "the activation lsq has learned scales of inputs, which no folder can hold: take integers or none"

    def limits(self, name: str) -> tuple[int, int]:
        """The lowest and the highest whole number of the inputs of this name."""
        if matches(self.unsigned, name):
            return 0, (1 << self.bits) - 1
        return (-1, 1) if self.bits == 1 else (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1)

    def given(self) -> Given:
        vectors = (SCALES, BEFORE, AFTER) if self.biases else (SCALES,)
        first = {name: nn.Parameter(torch.full((1,), float(name == SCALES), device="cpu")) for name in vectors}
        return {**first, BEGUN: torch.zeros((), dtype=torch.bool, device="cpu")}

    def shape(self, name: str, inputs: Tensor) -> tuple[int, ...]:
        """Of scales, as inputs are divided by them: [positions, 1], [channels] or [1]."""
        if self.scale == "channel" or matches(self.channels, name):
            return (inputs.shape[-1],)
        return (inputs.shape[-2], 1) if self.scale == "position" and inputs.dim() > 2 else (1,)

    @torch.no_grad()
    def begin(self, layer: Layer, inputs: Tensor, shape: tuple[int, ...]) -> None:
        """First scales, by a batch, and biases of the channels' number."""
        high = self.limits(layer.name)[1]
        means = inputs.abs().float().reshape(-1, *inputs.shape[-2:]) if inputs.dim() > 1 else inputs.abs().float()
        kept = means.dim() - len(shape)
        over = [place for place in range(means.dim()) if place < kept or shape[place - kept] == 1]
        first = (4 if matches(self.unsigned, layer.name) else 2) * means.mean(over).flatten() / high**0.5
        scales = layer.own(SCALES)
        scales.data = first.clamp(min=SMALLEST).to(scales.dtype)
        for name in (BEFORE, AFTER) if self.biases else ():
            layer.own(name).data = scales.new_zeros(inputs.shape[-1])
        layer.own(BEGUN).fill_(True)

    def rounded(self, layer: Layer, inputs: Tensor) -> Tensor:
        shape = self.shape(layer.name, inputs)
        if not bool(layer.own(BEGUN)):
            self.begin(layer, inputs, shape)
        scales: Tensor = layer.own(SCALES)
        self._check(layer, inputs, max(shape), len(shape) == 2)
        with torch.no_grad():
            scales.clamp_(min=SMALLEST)
        signs = self.bits == 1 and self.limits(layer.name)[0] < 0
        moved = inputs + layer.own(BEFORE).to(inputs.dtype) if self.biases else inputs
        found = few_levels(moved, scales.view(shape), self.limits(layer.name), signs)
        return found + layer.own(AFTER).to(inputs.dtype) if self.biases else found

    def _check(self, layer: Layer, inputs: Tensor, wanted: int, positions: bool) -> None:
        held, what = len(layer.own(SCALES)), "positions" if positions else "channels"
        if self.biases and held == wanted:
            held, wanted, what = len(layer.own(BEFORE)), inputs.shape[-1], "channels"
        if held != wanted:
            raise FeatherError(
                f"{layer.name} has learned scales or biases for {held} {what} of its input, and gets {wanted}: keep to "
                "inputs of one length, or set activation.scale=tensor and activation.biases=false"
            )
