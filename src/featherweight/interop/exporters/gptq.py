"""GPTQ, versions 1 and 2: see the importer for the layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.interop.bits import WORD, pack_words
from featherweight.interop.integers import Grid, Integers
from featherweight.interop.quantised_export import QuantisedExporter, commonest
from featherweight.registry import register

BITS = (2, 3, 4, 8)


@register("exporter", "gptq")
class GptqExporter(QuantisedExporter):
    """2, 3, 4 and 8 bits, with act-order; layers that differ from most are named under `dynamic`."""

    title = "GPTQ"
    version: Literal["v2", "v1"] = Field(
        "v2", description="v1 stores zero points less one, which a zero point of 0 does not survive"
    )

    def unfit(self, grid: Grid) -> str:
        if grid.bits not in BITS:
            return f"the format has 2, 3, 4 and 8 bits, not {grid.bits}"
        for side, size in zip(("outputs", "inputs"), grid.shape, strict=True):
            if size * grid.bits % WORD:
                return f"its {size} {side} of {grid.bits} bits fill no whole words of {WORD}"
        return ""

    def layouts(self, grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        (out, columns), groups = grid.shape, grid.groups
        return {
            "qweight": (torch.int32, (columns * grid.bits // WORD, out)),
            "qzeros": (torch.int32, (groups, out * grid.bits // WORD)),
            "scales": (torch.float16, (groups, out)),
            "g_idx": (torch.int32, (columns,)),
        }

    def stored(self, grid: Grid, integers: Integers, which: str) -> Tensor:
        (out, columns), bits = grid.shape, grid.bits
        if which == "qweight":
            return pack_words(integers.codes, bits).T.contiguous()
        if which == "qzeros":
            points = integers.zero_points
            if points is None:
                points = torch.full((out, grid.groups), 1 << (bits - 1), dtype=torch.uint8)
            if self.version == "v1":
                if bool((points == 0).any()):
                    raise ValueError("it has zero points of 0, which version v1 cannot say: --set version=v2")
                points = points - 1
            return pack_words(points.T.contiguous(), bits)
        if which == "scales":
            return integers.scales.T.contiguous()
        if integers.index is not None:
            return integers.index
        return (torch.arange(columns) // grid.group_size).to(torch.int32)

    def settings(self, grids: Mapping[str, Grid], plain: Sequence[str]) -> dict[str, Any]:
        base = commonest(grids, _scheme)
        own = {module: _scheme(grid) for module, grid in grids.items() if _scheme(grid) != base}
        dynamic: dict[str, Any] = {
            f"+:^{re.escape(module)}$": dict(zip(("bits", "group_size", "sym"), scheme, strict=True))
            for module, scheme in own.items()
        }
        dynamic |= {f"-:^{re.escape(module)}$": {} for module in plain}
        bits, size, symmetric = base
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "sym": symmetric,
            "desc_act": not all(grid.ordered for grid in grids.values()),
            "lm_head": False,
            "checkpoint_format": "gptq_v2" if self.version == "v2" else "gptq",
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }


def _scheme(grid: Grid) -> tuple[int, int, bool]:
    return grid.bits, -1 if grid.group_size >= grid.shape[1] else grid.group_size, grid.symmetric
