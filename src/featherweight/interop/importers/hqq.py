"""HQQ folders: half-quadratic quantisation, decoded by its own package, hqq, where that is installed.

A layer has `W_q`, `scale`, `zero` and a tensor for each of its settings. Zero points are fractions, and the owner's
product scale (q - zero) is rounded in the type in which it computes: the decoded values, not codes, are what it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.interop.folders import ForeignFolder, Layers, has_part, method_of, read_folder
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register

SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
LAYERS = Layers(".W_q", (".scale", ".zero", *(f".{name}" for name in SETTINGS)))


@register("importer", "hqq")
class Hqq(Importer):
    """HQQ, decoded by the package hqq to the type in which the model computes."""

    title = "HQQ"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "hqq" and has_part(path, LAYERS.marker)

    @classmethod
    def open(cls, path: Path) -> Imported:
        try:
            import hqq.core.quantize  # noqa: F401
        except ImportError:
            raise CheckpointError(
                f"{path} is quantised by HQQ, which its own package decodes: pip install hqq, or give the original"
            ) from None
        return read_folder(path, LAYERS, _describe, lambda folder: "HQQ, decoded")


def _describe(folder: ForeignFolder, module: str) -> ImportedTensor:
    name = f"{module}.shape"
    folder.expect(name, folder.shape(name, 1, ("int64", "int32")), (2,))
    rows, columns = (int(side) for side in folder.tensor(name))
    parts = [part for part in LAYERS.all if folder.has(module + part)]

    def values() -> Tensor:
        from hqq.core.quantize import HQQLinear

        layer = HQQLinear(None, None, compute_dtype=folder.dtype, device="cpu")
        try:
            layer.load_state_dict({part[1:]: folder.tensor(module + part).clone() for part in parts})
            found: Tensor = layer.dequantize()
        except Exception as error:  # whatever a foreign package raises
            raise ValueError(f"hqq cannot decode it: {type(error).__name__} {str(error)[:100]}") from None
        if tuple(found.shape) != (rows, columns):
            raise ValueError(f"hqq decodes it to {list(found.shape)}, and it says {[rows, columns]}")
        return found.detach()

    return folder.decoded(module, (rows, columns), folder.dtype, values)
