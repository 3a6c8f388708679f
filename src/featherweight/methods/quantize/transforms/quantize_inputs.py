"""Integer inputs: the layer rounds what it is given, a scale per token and group (FlexQ, arXiv 2508.04405).

The weight stays as it is, so this is the identity on the axis of transforms: it only states in the stored model how the
layer's input is rounded when the model runs. As the last word about an input it comes first in a recipe's list of
transforms (outermost); calibration sees inputs that are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import LayerTransform, Transform
from featherweight.methods.quantize.transforms.identity import Identity
from featherweight.model.layers.activations import SENSITIVE, input_bits
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.quantized_input import QuantizedInput


@register("transform", "quantize-inputs")
class QuantizeInputs(Transform):
    """Round a layer's input to integers, dynamically per token and group (see the module)."""

    portable: ClassVar[bool] = True
    bits: int = Field(6, ge=2, le=16, description="bits of inputs")
    group_size: int = Field(128, ge=1, description="input columns of a token that share a scale")
    wide: tuple[str, ...] = Field(SENSITIVE, description="patterns of layers, by last name, with a sensitive input")
    wide_bits: int = Field(8, ge=2, le=16, description="bits of the inputs of those")

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        return RoundedInput(input_bits(role, self.bits, self.wide_bits, self.wide), self.group_size)


@dataclass(frozen=True)
class RoundedInput(Identity):
    """The identity, stored as a `quantized-input` code."""

    bits: int
    group_size: int

    def wrap(self, code: Code) -> Code:
        return QuantizedInput(code, self.bits, self.group_size)
