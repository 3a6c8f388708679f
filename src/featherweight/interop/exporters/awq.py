"""AWQ, version gemm: 4 bits, one group size for all layers; see the importer for the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.interop.bits import pack_words
from featherweight.interop.integers import Grid, Integers
from featherweight.interop.quantised_export import QuantisedExporter, commonest
from featherweight.registry import register

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight a nibble is, from the lowest."""
BITS, PER_WORD = 4, 8


@register("exporter", "awq")
class AwqExporter(QuantisedExporter):
    """Symmetric codes get their zero points of 8 written out, so that all layers are alike."""

    title = "AWQ"

    def unfit(self, grid: Grid) -> str:
        if grid.bits != BITS:
            return f"the format has {BITS} bits, not {grid.bits}"
        if grid.shape[1] % grid.group_size:
            return f"its {grid.shape[1]} columns are no multiple of its groups of {grid.group_size}"
        if not grid.ordered:
            return "its columns are in another order, which the format cannot say"
        return "" if grid.shape[0] % PER_WORD == 0 else f"its {grid.shape[0]} outputs are no multiple of {PER_WORD}"

    def unlike(self, grids: Mapping[str, Grid]) -> dict[str, str]:
        size = _common_size(grids)
        return {
            name: f"its groups are of {grid.group_size} columns, those of most of {size}, and the format has one size"
            for name, grid in grids.items()
            if not (_is_whole(grid) if size == -1 else grid.group_size == size)
        }

    def layouts(self, grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        (out, columns), groups = grid.shape, grid.groups
        return {
            "qweight": (torch.int32, (columns, out // PER_WORD)),
            "qzeros": (torch.int32, (groups, out // PER_WORD)),
            "scales": (torch.float16, (groups, out)),
        }

    def stored(self, grid: Grid, integers: Integers, which: str) -> Tensor:
        if which == "qweight":
            return _words(integers.codes.T)
        if which == "scales":
            return integers.scales.T.contiguous()
        points = integers.zero_points
        if points is None:
            points = torch.full((grid.shape[0], grid.groups), 1 << (BITS - 1), dtype=torch.uint8)
        return _words(points.T)

    def settings(self, grids: Mapping[str, Grid], plain: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": _common_size(grids),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain) or None,
        }


def _is_whole(grid: Grid) -> bool:
    return grid.group_size >= grid.shape[1]


def _common_size(grids: Mapping[str, Grid]) -> int:
    """The group size of most layers; -1, whole rows, where all are such."""
    return -1 if all(map(_is_whole, grids.values())) else int(commonest(grids, lambda grid: grid.group_size))


def _words(values: Tensor) -> Tensor:
    """int32 [rows, out / 8] of uint8 [rows, out], nibbles in AWQ's order."""
    rows, out = values.shape
    ordered = values.reshape(rows, out // PER_WORD, PER_WORD)[:, :, torch.tensor(ORDER)]
    return pack_words(ordered.reshape(rows, out).contiguous(), BITS)
