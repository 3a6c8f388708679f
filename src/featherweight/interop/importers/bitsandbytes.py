"""bitsandbytes folders: NF4 and FP4 by blocks of the flattened matrix, and int8 by rows.

Four bits: `weight` holds two values a byte, the first in the upper four bits; value i is quant_map[code] times
absmax[i // blocksize]. `absmax` may itself be coded: nested_quant_map[absmax] nested_absmax[i // nested_blocksize] +
nested_offset. A JSON text in `weight.quant_state.bitsandbytes__nf4` has block sizes, shape and type. Eight bits:
`weight` int8 [out, in] and `SCB` float32 [out]; W = SCB / 127 times weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.interop.folders import MODEL_DTYPES, ForeignFolder, Layers, has_part, method_of, read_folder
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register
from featherweight.storage.codes.uniform import Uniform

STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
FOUR = Layers(
    ".weight.quant_map",
    (".weight", ".weight.absmax", ".weight.nested_absmax", ".weight.nested_quant_map", *STATES),
)
EIGHT = Layers(".SCB", (".weight", ".weight_format"))
ONE_127TH = torch.tensor(1 / 127, dtype=torch.float32)


@register("importer", "bitsandbytes")
class BitsAndBytes(Importer):
    """int8 as uniform codes; NF4 and FP4 decoded to the type that the folder names for it."""

    title = "bitsandbytes"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "bitsandbytes" and has_part(path, FOUR.marker, EIGHT.marker)

    @classmethod
    def open(cls, path: Path) -> Imported:
        if has_part(path, FOUR.marker):
            return read_folder(path, FOUR, _four, lambda folder: "bitsandbytes, 4 bits, decoded")
        return read_folder(path, EIGHT, _eight, lambda folder: "bitsandbytes, int8")


def _eight(folder: ForeignFolder, module: str) -> ImportedTensor:
    rows, columns = folder.shape(f"{module}.weight", 2, ("int8",))
    folder.expect(f"{module}.SCB", folder.shape(f"{module}.SCB", 1, ("float32", "float16", "bfloat16")), (rows,))
    if folder.has(f"{module}.weight_format") and bool(folder.tensor(f"{module}.weight_format").any()):
        raise folder.refuse(f"{module} is stored in tiles for one kind of GPU: save it again with a newer bitsandbytes")
    spec = {
        "kind": "uniform", "shape": [rows, columns], "bits": 8, "symmetric": True, "group_size": columns,
        "scale_dtype": "float32",
    }  # fmt: skip

    def code() -> Uniform:
        codes = (folder.tensor(f"{module}.weight").to(torch.int16) + 128).to(torch.uint8)
        scales = folder.tensor(f"{module}.SCB").float().unsqueeze(1) * ONE_127TH
        return Uniform.encode(codes, scales, None, 8, columns, scale_dtype=torch.float32)

    return folder.coded(module, spec, code)


def _four(folder: ForeignFolder, module: str) -> ImportedTensor:
    state = _state(folder, module)
    shape = (int(state["shape"][0]), int(state["shape"][1]))
    count, block = math.prod(shape), int(state["blocksize"])
    _check(folder, module, state, count, block)

    def values() -> Tensor:
        raw = folder.tensor(f"{module}.weight").reshape(-1).view(torch.uint8)
        codes = torch.stack([raw >> 4, raw & 15], -1).reshape(-1)[:count]
        table = folder.tensor(f"{module}.weight.quant_map").float()
        sizes = _absmax(folder, module, state)
        return (table[codes.long()] * sizes[torch.arange(count) // block]).reshape(shape)

    return folder.decoded(module, shape, MODEL_DTYPES[state["dtype"]], values)


def _state(folder: ForeignFolder, module: str) -> dict[str, Any]:
    """The JSON text of a layer, checked."""
    name = next((module + state for state in STATES if folder.has(module + state)), None)
    if name is None:
        raise folder.refuse(f"{module} has no quant_state for nf4 or fp4: download the model again")
    folder.shape(name, 1, ("uint8",))
    try:
        state = json.loads(bytes(folder.tensor(name).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise folder.refuse(f"{name} is no JSON text ({str(error)[:80]})") from None
    state = state if isinstance(state, dict) else {}
    shape, block, dtype = state.get("shape"), state.get("blocksize"), state.get("dtype")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not is_shape or type(block) is not int or block < 1 or dtype not in MODEL_DTYPES:
        raise folder.refuse(f"{name} says {shown(state, 200)}, which lacks a shape, a block size or a type")
    return state


def _check(folder: ForeignFolder, module: str, state: dict[str, Any], count: int, block: int) -> None:
    weight = folder.checkpoint.entry(f"{module}.weight") if folder.has(f"{module}.weight") else None
    if weight is None or weight.nbytes != -(-count // 2):
        raise folder.refuse(f"{module}.weight is not there, or not of the {-(-count // 2)} bytes that its shape needs")
    folder.expect(f"{module}.weight.quant_map", folder.shape(f"{module}.weight.quant_map", 1, ("float32",)), (16,))
    nested = folder.has(f"{module}.weight.nested_absmax")
    blocks = -(-count // block)
    dtype = "uint8" if nested else "float32"
    folder.expect(f"{module}.weight.absmax", folder.shape(f"{module}.weight.absmax", 1, (dtype,)), (blocks,))
    if nested:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, int | float):
            raise folder.refuse(f"the quant_state of {module} lacks nested_blocksize or nested_offset")
        for part, expected in (("nested_absmax", -(-blocks // size)), ("nested_quant_map", 256)):
            name = f"{module}.weight.{part}"
            folder.expect(name, folder.shape(name, 1, ("float32",)), (expected,))


def _absmax(folder: ForeignFolder, module: str, state: dict[str, Any]) -> Tensor:
    """float32 [blocks]: the largest magnitude in each block."""
    absmax = folder.tensor(f"{module}.weight.absmax")
    if not folder.has(f"{module}.weight.nested_absmax"):
        return absmax
    table, sizes = (folder.tensor(f"{module}.weight.{part}") for part in ("nested_quant_map", "nested_absmax"))
    steps = sizes[torch.arange(absmax.numel()) // int(state["nested_blocksize"])]
    return table[absmax.long()] * steps + float(state["nested_offset"])
