"""Writing safetensors files: streamed, hashed per tensor, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featherweight.errors import OutputError
from featherweight.storage.checkpoint.format import FORMAT_VERSION, HASHES_KEY, VERSION_KEY
from featherweight.system.files import replacing

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Blob:
    """One tensor to write: its description and where its bytes come from."""

    name: str
    dtype: str  # safetensors code, "BF16"
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[memoryview]]


def blob_of(name: str, tensor: Tensor) -> Blob:
    """A tensor in memory as something to write."""
    raw = tensor.detach().cpu().contiguous()
    view: memoryview = raw.reshape(-1).view(torch.uint8).numpy().data if raw.numel() else memoryview(b"")
    return Blob(name, DTYPE_CODES[raw.dtype], tuple(raw.shape), view.nbytes, lambda: (view,))


def write_safetensors(
    path: Path,
    blobs: list[Blob],
    metadata: dict[str, str],
    sync: bool = True,
    coded: bool = True,
    *,
    in_order: bool = False,
) -> dict[str, str]:
    """Write a file atomically and return the SHA-256 (hex) of every tensor's bytes.

    `sync` waits for the disk, so that not even a power cut leaves a complete name on incomplete bytes. `coded` puts our
    format version into the header: the file is of use to featherweight alone. Without it the file is like any other.

    Tensors are laid out by falling element size, then name, so that each is aligned (what readers that map files
    need) and the same content always gives the same bytes. The hashes are in the header, which therefore is written
    twice: first with blanks, then, when all bytes have passed by, in its final form of the same length. `in_order`
    keeps the order of `blobs` instead, whose alignment is then the caller's to see to.
    """
    ordered, about, header = _prepared(blobs, metadata, coded, in_order)
    hashes = {blob.name: "" for blob in ordered}
    with replacing(path, sync) as stream:
        stream.write(header)
        for blob in ordered:
            digest, written = hashlib.sha256(), 0
            for chunk in blob.chunks():
                digest.update(chunk)
                stream.write(chunk)
                written += chunk.nbytes
            if written != blob.nbytes:
                raise OutputError(f"tensor {blob.name} gave {written} bytes instead of {blob.nbytes}")
            hashes[blob.name] = digest.hexdigest()
        final = _header(ordered, hashes, about)
        assert len(final) == len(header)
        stream.seek(0)
        stream.write(final)
    return hashes


def header_bytes(blobs: list[Blob], metadata: dict[str, str], coded: bool = True) -> int:
    """Bytes of a file before its first tensor; the file takes these and the tensors' and no others."""
    return len(_prepared(blobs, metadata, coded)[2])


def _prepared(
    blobs: list[Blob], metadata: dict[str, str], coded: bool, in_order: bool = False
) -> tuple[list[Blob], dict[str, str], bytes]:
    """The tensors in their order, what the header says beside them, and the header with blank hashes."""
    about = {**({VERSION_KEY: str(FORMAT_VERSION)} if coded else {}), **metadata}
    ordered = blobs if in_order else sorted(blobs, key=lambda b: (-_item_bytes(b), b.name))
    return ordered, about, _header(ordered, {blob.name: "0" * 64 for blob in ordered}, about)


def _item_bytes(blob: Blob) -> int:
    digits = "".join(c for c in blob.dtype.split("_")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


def _header(blobs: list[Blob], hashes: dict[str, str], metadata: dict[str, str]) -> bytes:
    described: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            **metadata,
            HASHES_KEY: json.dumps(hashes, separators=(",", ":")),
        }
    }
    offset = 0
    for blob in blobs:
        end = offset + blob.nbytes
        described[blob.name] = {"dtype": blob.dtype, "shape": list(blob.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
