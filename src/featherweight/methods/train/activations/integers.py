"""Integer inputs, a scale for each token (BitNet b1.58, arXiv 2402.17764): what the stored code `quantized-input` does.

The step is max|x| / (2^(b-1) - 1) of the token, rounded to float16 as our kernels have it; the gradient goes straight
through.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from featherweight.methods.train.base import Activation, Layer
from featherweight.model.layers.activations import quantized_inputs
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.quantized_input import QuantizedInput


@register("activation", "integers")
class Integers(Activation):
    """Whole numbers of b bits, a scale a token (see the module)."""

    bits: int = Field(8, ge=2, le=16, description="of an input")

    def rounded(self, layer: Layer, inputs: Tensor) -> Tensor:
        return quantized_inputs(inputs, self.bits, inputs.shape[-1])

    def stored(self, code: Code) -> Code:
        return QuantizedInput(code, self.bits, code.shape[1])
