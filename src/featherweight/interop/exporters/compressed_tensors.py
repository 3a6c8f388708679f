"""compressed-tensors, pack-quantized: what vLLM and transformers read; see the importer for the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.interop.bits import WORD, pack_padded, pack_words
from featherweight.interop.integers import Grid, Integers
from featherweight.interop.quantised_export import QuantisedExporter
from featherweight.registry import register


@register("exporter", "compressed-tensors")
class CompressedTensorsExporter(QuantisedExporter):
    """2 to 8 bits, symmetric or not, groups or rows, act-order; layers of other codes plain, if asked."""

    title = "compressed-tensors"
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16, torch.float32)
    packing: Literal["padded", "dense"] = Field(
        "padded",
        description="of 3, 5, 6 and 7 bits: floor(32 / bits) values a word, as compressed-tensors up to 0.17 and vLLM "
        "0.32 read them, or dense, as later ones do",
    )

    def unfit(self, grid: Grid) -> str:
        if not 2 <= grid.bits <= 8:
            return f"the format has 2 to 8 bits, not {grid.bits}"
        if grid.shape[1] % grid.group_size:
            return f"its {grid.shape[1]} columns are no multiple of its groups of {grid.group_size}"
        return ""

    def layouts(self, grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, columns = grid.shape
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (rows, self._words(columns, grid.bits))),
            "weight_scale": (grid.scale_dtype, (rows, grid.groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not grid.symmetric:
            found["weight_zero_point"] = (torch.int32, (self._words(rows, grid.bits), grid.groups))
        if not grid.ordered:
            found["weight_g_idx"] = (torch.int32, (columns,))
        return found

    def stored(self, grid: Grid, integers: Integers, which: str) -> Tensor:
        if which == "weight_packed":
            return self._pack(integers.codes, grid.bits)
        if which == "weight_scale":
            return integers.scales
        if which == "weight_shape":
            return torch.tensor(grid.shape)
        if which == "weight_zero_point" and integers.zero_points is not None:
            return self._pack(integers.zero_points.T.contiguous(), grid.bits).T.contiguous()
        assert integers.index is not None
        return integers.index

    def settings(self, grids: Mapping[str, Grid], plain: Sequence[str]) -> dict[str, Any]:
        alike: dict[tuple[Any, ...], list[str]] = {}
        for module, grid in grids.items():
            whole = grid.group_size >= grid.shape[1]
            key = (grid.bits, grid.symmetric, None if whole else grid.group_size, grid.ordered)
            alike.setdefault(key, []).append(module)
        groups = {}
        for number, ((bits, symmetric, size, ordered), modules) in enumerate(alike.items()):
            weights = {
                "num_bits": bits, "type": "int", "symmetric": symmetric,
                "strategy": "group" if size else "channel", "group_size": size, "block_structure": None,
                "dynamic": False, "actorder": None if ordered else "group", "observer": "minmax",
                "observer_kwargs": {},
            }  # fmt: skip
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(alike) == 1 else modules,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted({*plain, "lm_head"}),
            "kv_cache_scheme": None,
        }

    def _words(self, count: int, bits: int) -> int:
        return -(-count // (WORD // bits)) if self.packing == "padded" else -(-count * bits // WORD)

    def _pack(self, values: Tensor, bits: int) -> Tensor:
        padded = self.packing == "padded" and WORD % bits  # else both are the same
        return pack_padded(values, bits) if padded else pack_words(values, bits)
