"""Inputs as they are."""

from __future__ import annotations

from featherweight.methods.train.base import Activation
from featherweight.registry import register


@register("activation", "none")
class AsTheyAre(Activation):
    """No rounding of inputs (see the module)."""
