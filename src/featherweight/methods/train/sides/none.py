"""Nothing beside the rounded matrix."""

from __future__ import annotations

from featherweight.methods.train.base import Side
from featherweight.registry import register


@register("side", "none")
class NoSide(Side):
    """The product alone (see the module)."""
