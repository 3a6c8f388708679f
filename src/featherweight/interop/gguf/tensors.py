"""What becomes of a stored tensor: a code that decodes to the same bits, or plain values in a type that holds them.

Matrices of linear layers and the embedding become codes wherever one of ours holds their blocks (`blocks.py`). All else
is plain: float16 and bfloat16 as they are; float32 as it is where it has one dimension, and matrices in bfloat16 or
float16 where that holds every value, else in float32; so are the types that the package gguf alone decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.blocks import AFFINE, SIGNS, TERNARY, Affine, Bytes, Floats, Parts
from featherweight.interop.gguf.file import Stored
from featherweight.interop.gguf.types import BlockType
from featherweight.interop.imports import ImportedTensor
from featherweight.native.packing import pack_bits, pack_trits
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.base import WHOLE_BYTES, dtype_name

WINDOW_WEIGHTS = 1 << 22
"""So many are in memory as whole numbers or floats at a time."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A tensor of the model and what is stored for it.

    name : as the Hugging Face family has it
    planes : one stored tensor, or the trit-planes of which it is the sum
    order : rows of the stored tensor in the order of the model's (elements of a vector), None where they are the same
    minus : what is taken away from every value
    coded : whether the model may have a code in this place
    """

    name: str
    planes: tuple[Stored, ...]
    order: Order | None = None
    minus: float = 0.0
    coded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.planes[0].info.shape

    @property
    def kind(self) -> str:
        """Name of its type."""
        return self.planes[0].info.type.name

    def described(self) -> ImportedTensor:
        """The tensor for the folder; values are read when `load` is called."""
        spec = self._spec()
        if spec is not None:
            return ImportedTensor(self.name, self.shape, lambda: self._code(spec), spec=spec)
        dtype = self._dtype()
        return ImportedTensor(self.name, self.shape, lambda: self._values(dtype), dtype)

    def _spec(self) -> dict[str, Any] | None:
        """The spec of the code that holds the very values, or None."""
        kind = self.kind
        if not self.coded or len(self.shape) != 2:
            return None
        if kind in AFFINE:
            return self._uniform_spec(AFFINE[kind])
        if kind in SIGNS:
            settings: dict[str, Any] = {"planes": 1, "group_size": SIGNS[kind].group, "rows_per_scale": 1}
            return {"kind": "binary-planes", "shape": list(self.shape), **settings, "scale_dtype": "float16"}
        if kind not in TERNARY:
            return None
        if any(_has_threes(plane, TERNARY[kind]) for plane in self.planes):
            if len(self.planes) > 1:
                raise CheckpointError(f"a plane of {shown(self.planes[0].info.name)} has a digit that is no trit")
            return self._uniform_spec(TERNARY[kind])
        settings = {"planes": len(self.planes), "tied": False, "group_size": TERNARY[kind].group}
        return {
            "kind": "trit-planes",
            "shape": list(self.shape),
            **settings,
            "packing": "base3",
            "scale_dtype": "float16",
        }

    def _uniform_spec(self, affine: Affine) -> dict[str, Any]:
        symmetric = not affine.offsets and affine.zero == 1 << (affine.bits - 1)
        return {
            "kind": "uniform",
            "shape": list(self.shape),
            "bits": affine.bits,
            "symmetric": symmetric,
            "group_size": affine.group,
            "scale_dtype": dtype_name(affine.scales),
            **({"offsets": True} if affine.offsets else {}),
        }

    def _code(self, spec: dict[str, Any]) -> Code:
        kind = self.kind
        affine = (AFFINE | TERNARY | SIGNS)[kind]
        make = {"uniform": _uniform, "binary-planes": _signs, "trit-planes": _trits}[spec["kind"]]
        planes = []
        for plane in self.planes:
            packed: list[dict[str, Tensor]] = []
            for rows in self._windows(plane):
                parts = affine.split(rows.reshape(-1, plane.info.type.bytes))
                self._check(parts)
                packed.append(make(parts, len(rows), affine))
            planes.append({name: torch.cat([part[name] for part in packed]) for name in packed[0]})
            plane.file.release(plane.info)
        tensors = planes[0]
        if spec["kind"] != "uniform":  # planes, one after the other; their scales side by side
            stacked = {name: [plane[name] for plane in planes] for name in tensors}
            tensors = {name: torch.stack(found, -1 if name == "scales" else 0) for name, found in stacked.items()}
        return code_from(spec, tensors)

    def _check(self, parts: Parts) -> None:
        for numbers in (parts.scales, parts.offsets):
            if numbers is not None and not np.isfinite(numbers).all():
                raise CheckpointError(
                    f"tensor {shown(self.planes[0].info.name)} of {self.planes[0].file.path} has a scale that is no "
                    "finite number: the file is damaged, download it again"
                )

    def _windows(self, plane: Stored) -> Iterator[Bytes]:
        """Rows of the stored bytes, some at a time, in the model's order."""
        rows, columns = plane.count, plane.info.shape[-1]
        step = max(1, WINDOW_WEIGHTS // (WHOLE_BYTES * columns)) * WHOLE_BYTES
        order = self.order if len(self.shape) > 1 else None
        stored = plane.rows(0, rows)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            yield stored[first:last] if order is None else stored[order[first:last]]

    def _dtype(self) -> torch.dtype:
        """Of plain values: see the module."""
        kind = self.kind
        if len(self.shape) == 1 or kind not in PLAIN:
            return torch.float32
        if kind != "F32":
            return PLAIN[kind]
        fitting = {torch.bfloat16, torch.float16}
        for rows in self._windows(self.planes[0]):
            values = torch.from_numpy(_floats(self.planes[0].info.type, rows))
            fitting = {dtype for dtype in fitting if bool((values.to(dtype).float() == values).all())}
            if not fitting:
                break
        self.planes[0].file.release(self.planes[0].info)
        return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in fitting), torch.float32)

    def _values(self, dtype: torch.dtype) -> Tensor:
        (plane,) = self.planes
        values = torch.empty(self.shape, dtype=dtype, device="cpu")
        flat, done = values.view(plane.count, -1), 0
        for rows in self._windows(plane):
            floats = torch.from_numpy(_floats(plane.info.type, rows))
            flat[done : done + len(rows)] = floats - self.minus if self.minus else floats
            done += len(rows)
        plane.file.release(plane.info)
        if self.order is not None and values.dim() == 1:
            values = values[torch.from_numpy(self.order)]
        return values


def _has_threes(stored: Stored, affine: Affine) -> bool:
    """Whether a digit of two bits is 3, which no trit is."""
    if affine.fields is None:
        return False
    rows, per_row = stored.count, stored.info.nbytes // stored.count
    step = max(1, 4 * WINDOW_WEIGHTS // per_row)
    try:
        for first in range(0, rows, step):
            blocks = stored.rows(first, min(rows, first + step)).reshape(-1, stored.info.type.bytes)[:, affine.fields]
            if bool((blocks & (blocks >> 1) & 0x55).any()):
                return True
        return False
    finally:
        stored.file.release(stored.info)


def _scales(numbers: Floats, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).view(rows, -1).to(dtype)


def _uniform(parts: Parts, rows: int, affine: Affine) -> dict[str, Tensor]:
    found = {
        "codes": pack_bits(torch.from_numpy(parts.digits.reshape(-1)), affine.bits),
        "scales": _scales(parts.scales, rows, affine.scales),
    }
    if parts.offsets is not None:
        found["offsets"] = _scales(parts.offsets, rows, affine.scales)
    elif affine.zero != 1 << (affine.bits - 1):
        zeros = torch.full((parts.scales.size,), affine.zero, dtype=torch.uint8, device="cpu")
        found["zero_points"] = pack_bits(zeros, affine.bits)
    return found


def _trits(parts: Parts, rows: int, affine: Affine) -> dict[str, Tensor]:
    trits = torch.from_numpy(parts.digits.reshape(-1).astype(np.int8) - np.int8(1))
    return {"trits": pack_trits(trits, "base3"), "scales": _scales(parts.scales, rows, affine.scales)}


def _signs(parts: Parts, rows: int, affine: Affine) -> dict[str, Tensor]:
    signs = pack_bits(torch.from_numpy(parts.digits.reshape(-1)), 1)
    return {"signs": signs, "scales": _scales(parts.scales, rows, affine.scales)}


def _floats(kind: BlockType, rows: Bytes) -> Floats:
    """Values float32 [rows, columns] of the bytes of rows."""
    rows = np.ascontiguousarray(rows)
    values: Floats
    if kind.name == "F32":
        values = rows.view(np.float32).copy()
        return values
    if kind.name == "F16":
        values = rows.view(np.float16).astype(np.float32)
        return values
    if kind.name == "BF16":
        values = (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values
    affine = (AFFINE | TERNARY | SIGNS).get(kind.name)
    if affine is None:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(rows, GGMLQuantizationType(kind.number))
        return values
    parts = affine.split(rows.reshape(-1, kind.bytes))
    digits = parts.digits.reshape(*parts.scales.shape, -1).astype(np.int16)
    whole = 2 * digits - 1 if kind.name in SIGNS else digits - affine.zero
    values = whole.astype(np.float32) * parts.scales[:, :, None]
    if parts.offsets is not None:
        values += parts.offsets[:, :, None]
    return values.reshape(len(rows), -1)
