"""Fixed allocation: every layer gets the grid the recipe names for it."""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.methods.quantize.base import Allocator, Grid
from featherweight.registry import register


@register("allocation", "fixed")
class Fixed(Allocator):
    """No budget: the recipe's grid, or that of its first matching override."""

    def assign(self, shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, Grid]) -> dict[str, Grid]:
        return dict(grids)
