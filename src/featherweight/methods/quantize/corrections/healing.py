"""Healing: after rounding, train digits and scales together against the original, by gradients straight through.

Every weight gets a latent value that starts at the original weight, as near as its digit allows, so that the first
model is the given one; its digit is the nearest to it, and the gradient goes straight through
(`featherweight.methods.quantize.latent`). What is minimised is that of scale tuning: a block's error on the stream that
reaches it, or the divergence of the model's predictions from the original's. So a ternary model is distilled from its
own original, as the papers that train ternary models do it at length (BitNet b1.58, arXiv 2402.17764; TriLM, arXiv
2407.12327), but on the grids and codes of quantisation and with any of their starts. Held-out samples choose the step
that is kept, the start among them.
"""

from __future__ import annotations

import torch
from pydantic import Field

from featherweight.methods.quantize.corrections.scale_tuning import Original, ScaleTuning
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.latent import LatentCode
from featherweight.registry import register
from featherweight.storage.codes import Code


@register("correction", "healing")
class Healing(ScaleTuning):
    """Train digits and scales of a block or of the model against the original (see the module)."""

    steps: int = Field(400, ge=1, description="optimiser steps")
    norms: bool = Field(True, description="also train the norms that feed the layers; they are stored anew")

    @property
    def training_bytes(self) -> int:
        return 40  # decoded weight and its gradient, digits; latent value, its change, gradient, two moments, the best

    def trainable(self, code: Code, weight: Original, name: str, device: torch.device) -> TunableCode:
        return LatentCode(code, weight(name), device)
