"""AWQ folders: 4 bits, packed along the output (version gemm) or the input (gemv).

gemm: `qweight` int32 [in, out / 8], in whose word c the nibble n, the lowest first, is output 8 c + ORDER[n]; `qzeros`
int32 [groups, out / 8] alike; `scales` [groups, out]. gemv: `qweight` int32 [out, in / 8], nibbles in their order;
`qzeros` int32 [out, words] and `scales` [out, 8 words], both with room for more groups than there are.
W[o, i] = scales (q - z).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.interop.bits import unpack_words
from featherweight.interop.folders import FLOATS, ForeignFolder, Layers, has_part, method_of, read_folder
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register
from featherweight.storage.codes.base import dtype_name, groups_of
from featherweight.storage.codes.uniform import Uniform

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight a nibble is, from the lowest."""
PLACES = tuple(ORDER.index(output) for output in range(8))
BITS, PER_WORD = 4, 8
LAYERS = Layers(".qweight", (".qzeros", ".scales"))
AS_GEMM = ("gemm", "exllama", "ipex")
"""Versions whose files are those of gemm; they differ in how they are run."""


@register("importer", "awq")
class Awq(Importer):
    """AWQ, versions gemm and gemv: exact, as uniform codes."""

    title = "AWQ"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "awq" and has_part(path, LAYERS.marker)

    @classmethod
    def open(cls, path: Path) -> Imported:
        return read_folder(path, LAYERS, _describe, _origin)


def _origin(folder: ForeignFolder) -> str:
    bits = folder.settings.get("bits", folder.settings.get("w_bit", BITS))
    if bits != BITS:
        raise folder.refuse(f"AWQ with {shown(bits)} bits is not read, only with 4")
    return f"AWQ {_version(folder)}, 4 bits"


def _version(folder: ForeignFolder) -> str:
    found = folder.settings.get("version", "gemm")
    version = found.lower() if isinstance(found, str) else ""
    if version not in (*AS_GEMM, "gemv"):
        raise folder.refuse(f"its AWQ version is {shown(found)}, and only gemm and gemv are read")
    return "gemv" if version == "gemv" else "gemm"


def _group_size(folder: ForeignFolder, columns: int) -> int:
    size = folder.settings.get("group_size", folder.settings.get("q_group_size", 128))
    if type(size) is not int or not (size == -1 or size > 0):
        raise folder.refuse(f"group_size in its quantization_config is {shown(size)}, expected -1 or a positive number")
    return columns if size == -1 else min(size, columns)


def _describe(folder: ForeignFolder, module: str) -> ImportedTensor:
    return _gemm(folder, module) if _version(folder) == "gemm" else _gemv(folder, module)


def _gemm(folder: ForeignFolder, module: str) -> ImportedTensor:
    columns, words = folder.shape(f"{module}.qweight", 2, ("int32",))
    size, out = _group_size(folder, columns), words * PER_WORD
    groups = groups_of(columns, size)
    folder.expect(f"{module}.qzeros", folder.shape(f"{module}.qzeros", 2, ("int32",)), (groups, words))
    folder.expect(f"{module}.scales", folder.shape(f"{module}.scales", 2, FLOATS), (groups, out))

    def code(spec: dict[str, Any]) -> Uniform:
        codes, zeros = (_in_order(folder.tensor(f"{module}.{name}"), out).T for name in ("qweight", "qzeros"))
        return _made(codes, folder.tensor(f"{module}.scales").T, zeros, spec)

    zeros = _in_order(folder.tensor(f"{module}.qzeros"), out)
    return _coded(folder, module, (out, columns), size, zeros, code)


def _gemv(folder: ForeignFolder, module: str) -> ImportedTensor:
    out, words = folder.shape(f"{module}.qweight", 2, ("int32",))
    columns = words * PER_WORD
    size = _group_size(folder, columns)
    groups = groups_of(columns, size)
    zero_words = folder.shape(f"{module}.qzeros", 2, ("int32",))[1]
    folder.expect(f"{module}.qzeros", folder.shape(f"{module}.qzeros", 2, ("int32",)), (out, zero_words))
    folder.expect(f"{module}.scales", folder.shape(f"{module}.scales", 2, FLOATS), (out, zero_words * PER_WORD))
    if zero_words * PER_WORD < groups:
        raise folder.refuse(f"{module}.qzeros has room for {zero_words * PER_WORD} groups of {groups}")

    def points() -> Tensor:
        return unpack_words(folder.tensor(f"{module}.qzeros"), zero_words * PER_WORD, BITS)[:, :groups]

    def code(spec: dict[str, Any]) -> Uniform:
        codes = unpack_words(folder.tensor(f"{module}.qweight"), columns, BITS)
        return _made(codes, folder.tensor(f"{module}.scales")[:, :groups], points(), spec)

    return _coded(folder, module, (out, columns), size, points(), code)


def _coded(
    folder: ForeignFolder, module: str, shape: tuple[int, int], size: int, zeros: Tensor, code: Any
) -> ImportedTensor:
    spec = {
        "kind": "uniform",
        "shape": list(shape),
        "bits": BITS,
        "symmetric": bool((zeros == 1 << (BITS - 1)).all()),
        "group_size": size,
        "scale_dtype": dtype_name(folder.checkpoint.entry(f"{module}.scales").torch_dtype),
    }
    return folder.coded(module, spec, lambda: code(spec))


def _made(codes: Tensor, scales: Tensor, zeros: Tensor, spec: dict[str, Any]) -> Uniform:
    points = None if spec["symmetric"] else zeros.contiguous()
    made = scales.contiguous()
    return Uniform.encode(codes.contiguous(), made, points, BITS, spec["group_size"], scale_dtype=made.dtype)


def _in_order(words: Tensor, out: int) -> Tensor:
    """uint8 [rows, out] of words [rows, out / 8] in AWQ's order."""
    nibbles = unpack_words(words, out, BITS).view(words.shape[0], -1, PER_WORD)
    return nibbles[:, :, torch.tensor(PLACES)].reshape(words.shape[0], out)
