"""FP8 folders: `weight` of float8 [out, in] with one scale for blocks of rows and columns (DeepSeek), rows, or all.

Decoded in float32, w times the scale, and rounded to the type in which the model computes, as transformers does where
there are no kernels for this type.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.interop.folders import FLOATS, ForeignFolder, Layers, method_of, read_folder, stored_entries
from featherweight.interop.grouping import spread
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register
from featherweight.storage.codes.base import groups_of

METHODS = ("fp8", "fbgemm_fp8")
MARKERS = (".weight_scale_inv", ".weight_scale")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
LEFT_OUT = (".input_scale", ".activation_scale", ".activation_scale_inv", ".input_scale_ub", ".k_scale", ".v_scale")


@register("importer", "fp8")
class Fp8(Importer):
    """FP8 of blocks, rows or whole matrices, decoded."""

    title = "FP8"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        """Where all weights of float8 are matrices with their scale beside them; transformers reads the others."""
        if method_of(config) not in METHODS:
            return False
        entries = stored_entries(path)
        coded = [name for name, entry in entries.items() if entry.dtype.startswith("F8_") and entry.dtype != "F8_E8M0"]
        return bool(coded) and all(
            name.endswith(".weight") and any(name.removesuffix(".weight") + marker in entries for marker in MARKERS)
            for name in coded
        )

    @classmethod
    def open(cls, path: Path) -> Imported:
        names = stored_entries(path)
        marker = next(marker for marker in MARKERS if any(name.endswith(marker) for name in names))
        return read_folder(
            path,
            Layers(marker, (".weight",), LEFT_OUT),
            lambda folder, module: _describe(folder, module, marker),
            lambda folder: f"FP8, decoded to {str(folder.dtype).removeprefix('torch.')}",
        )


def _describe(folder: ForeignFolder, module: str, marker: str) -> ImportedTensor:
    rows, columns = folder.shape(f"{module}.weight", 2, FLOAT8)
    name, shape = module + marker, (rows, columns)
    entry = folder.checkpoint.entry(name)
    if str(entry.torch_dtype).removeprefix("torch.") not in (*FLOATS, "float8_e8m0fnu"):
        raise folder.refuse(f"{name} is {entry.dtype}, and a scale is a floating-point number")
    block = _block(folder, name, shape, tuple(entry.shape))

    def values() -> Tensor:
        scales = folder.tensor(name).to(torch.float32)
        scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(scales.shape[0], -1)
        return folder.tensor(f"{module}.weight").float() * spread(scales, shape, block)

    return folder.decoded(module, shape, folder.dtype, values)


def _block(folder: ForeignFolder, name: str, shape: tuple[int, int], found: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns with one scale, whose number must be what is stored."""
    if all(side == 1 for side in found):
        return shape
    if found in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    stated = folder.settings.get("weight_block_size", [128, 128])
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(n) is int and n > 0 for n in stated):
        raise folder.refuse(f"weight_block_size in its quantization_config is {shown(stated)}, expected two numbers")
    folder.expect(name, found, (groups_of(shape[0], stated[0]), groups_of(shape[1], stated[1])))
    return stated[0], stated[1]
