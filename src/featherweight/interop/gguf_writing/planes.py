"""Trit-planes as tensors of their own: `NAME.ptqtp0`, `.ptqtp1`, `.ptqtp2`, each of type TQ2_0, whose sum is NAME.

It is the convention of the engine fucina (MIT), which runs such files; llama.cpp does not. `fucina.ptqtp.version` marks
the file, `fucina.ptqtp.tie_scales` one in which every set of planes is tied by powers of three.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import torch

from featherweight.interop.gguf_writing.block_types import TYPES, Bytes, pack_blocks
from featherweight.interop.gguf_writing.integers import window_rows
from featherweight.interop.stored import StoredTensor
from featherweight.native.packing import TRITS_PER_BYTE, unpack_trits
from featherweight.storage.codes.trit_planes import TritPlanes, tied_weights

VERSION_KEY, TIED_KEY = "fucina.ptqtp.version", "fucina.ptqtp.tie_scales"
KIND = TYPES["TQ2_0"]


def planes_of(tensor: StoredTensor) -> TritPlanes | None:
    """The code of a tensor that can be siblings: planes whose groups are whole blocks, with scales that fit fp16."""
    if tensor.spec is None or tensor.spec.get("kind") != TritPlanes.kind:
        return None
    code = tensor.code()
    assert isinstance(code, TritPlanes)
    columns = code.shape[1]
    whole = columns % KIND.weights == 0 and (code.group_size % KIND.weights == 0 or code.group_size >= columns)
    return code if whole and bool(plane_scales(code).half().isfinite().all()) else None


def plane_scales(code: TritPlanes) -> torch.Tensor:
    """Scales of every plane: float32 [out, groups, planes]."""
    scales = code.scales.float()
    return scales.unsqueeze(-1) * torch.tensor(code.plane_weights).float() if code.tied else scales


def exact_scales(code: TritPlanes) -> bool:
    """Whether fp16 holds them all."""
    scales = plane_scales(code)
    return torch.equal(scales.half().float(), scales)


def plane_rows(code: TritPlanes, plane: int) -> Iterator[Bytes]:
    """Bytes of a plane as TQ2_0, some rows at a time."""
    rows, columns = code.shape
    per_byte, step = TRITS_PER_BYTE[code.packing], window_rows(columns)
    place = torch.arange(0, columns, KIND.weights) // code.group_size
    scales = plane_scales(code)[:, :, plane].half().index_select(1, place)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        packed = code.trits[plane, first * columns // per_byte : -(-last * columns // per_byte)]
        trits = unpack_trits(packed, (last - first) * columns, code.packing).view(-1, KIND.weights).numpy()
        own = scales[first:last].reshape(-1).numpy()
        yield pack_blocks(KIND, trits, own, own).reshape(last - first, -1)


def add_keys(writer: gguf.GGUFWriter, codes: list[TritPlanes]) -> None:
    """What marks a file with planes."""
    writer.add_uint32(VERSION_KEY, 1)
    if all(code.tied and code.plane_weights == tied_weights(code.planes) for code in codes):
        writer.add_uint32(TIED_KEY, 1)
