"""GPTQ folders: integers packed along the input, groups of input columns, act-order by an index of groups.

A layer in -> out of b bits has `qweight` int32 [in b / 32, out], whose columns are dense little-endian bit strings;
`qzeros` int32 [groups, out b / 32], whose rows are such; `scales` [groups, out] and `g_idx` int32 [in], the group of an
input. W[o, i] = scales[g, o] (q - z), g = g_idx[i]. Format v1 stores z - 1 in b bits, v2 stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import shown
from featherweight.interop.bits import WORD, unpack_words, words_as_bytes
from featherweight.interop.folders import FLOATS, ForeignFolder, Layers, has_part, method_of, read_folder
from featherweight.interop.grouping import column_order
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register
from featherweight.storage.codes.base import dtype_name, groups_of
from featherweight.storage.codes.nested import index_dtype
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.uniform import Uniform

BITS = (2, 3, 4, 8)
LAYERS = Layers(".qweight", (".qzeros", ".scales", ".g_idx"))


@register("importer", "gptq")
class Gptq(Importer):
    """GPTQ, v1 and v2, of 2, 3, 4 and 8 bits: exact, as uniform codes, of permuted columns where act-order was used."""

    title = "GPTQ"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "gptq" and has_part(path, LAYERS.marker)

    @classmethod
    def open(cls, path: Path) -> Imported:
        return read_folder(path, LAYERS, _describe, _origin)


def _origin(folder: ForeignFolder) -> str:
    bits = folder.setting("bits", 1, 32)
    if bits not in BITS:
        raise folder.refuse(f"GPTQ with {bits} bits is not read, only with 2, 3, 4 or 8")
    return f"GPTQ {'v2' if _is_v2(folder) else 'v1'}, {bits} bits"


def _is_v2(folder: ForeignFolder) -> bool:
    found = folder.settings.get("checkpoint_format", folder.settings.get("format")) or "gptq"
    if folder.settings.get("is_marlin_format"):
        found = "marlin"
    if found not in ("gptq", "gptq_v2"):
        raise folder.refuse(
            f"its GPTQ format is {shown(found)}, and only gptq and gptq_v2 are read: convert it with the tool that "
            "wrote it, or start from the original model"
        )
    return bool(found == "gptq_v2")


def _describe(folder: ForeignFolder, module: str) -> ImportedTensor:
    words, out = folder.shape(f"{module}.qweight", 2, ("int32",))
    groups, _ = folder.shape(f"{module}.scales", 2, FLOATS)
    columns, bits = _columns(folder, module, words)
    folder.expect(f"{module}.scales", folder.shape(f"{module}.scales", 2, FLOATS), (groups, out))
    if out * bits % WORD:
        raise folder.refuse(f"{module} has {out} outputs, whose zero points of {bits} bits fill no whole words")
    folder.expect(f"{module}.qzeros", folder.shape(f"{module}.qzeros", 2, ("int32",)), (groups, out * bits // WORD))
    order, size = _order(folder, module, columns, groups)
    zeros = _zero_points(folder, module, out, bits)
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    dtype = folder.checkpoint.entry(f"{module}.scales").torch_dtype
    inner = {
        "kind": "uniform", "bits": bits, "symmetric": symmetric, "group_size": size, "scale_dtype": dtype_name(dtype),
    }  # fmt: skip

    def code() -> Uniform | Permuted:
        packed = words_as_bytes(folder.tensor(f"{module}.qweight").T)
        scales = folder.tensor(f"{module}.scales").T.contiguous()
        if order is None and symmetric:
            return Uniform(packed, scales, None, (out, columns), bits, size)
        codes = unpack_words(folder.tensor(f"{module}.qweight").T, columns, bits)
        codes = codes if order is None else codes[:, order]
        points = None if symmetric else zeros.T.contiguous()
        made = Uniform.encode(codes, scales, points, bits, size, scale_dtype=dtype)
        return made if order is None else Permuted(made, order.to(index_dtype(columns)))

    shape = {"shape": [out, columns]}
    spec = inner | shape if order is None else {"kind": "permuted", **shape, "inner": inner}
    return folder.coded(module, spec, code)


def _columns(folder: ForeignFolder, module: str, words: int) -> tuple[int, int]:
    """Inputs and bits of a layer: by its own shapes, as single layers may have other bits than the rest."""
    if folder.has(f"{module}.g_idx"):
        (columns,) = folder.shape(f"{module}.g_idx", 1, ("int32", "int64"))
        bits = words * WORD // columns
    else:
        bits = folder.setting("bits", 1, 32)
        columns = words * WORD // bits
    if bits not in BITS or columns * bits != words * WORD:
        raise folder.refuse(f"{module}.qweight has {words} words for {columns} inputs, which no 2, 3, 4 or 8 bits fill")
    return columns, bits


def _order(folder: ForeignFolder, module: str, columns: int, groups: int) -> tuple[Tensor | None, int]:
    """The order of columns in which groups are neighbours (None: the stored one), and the size of groups."""
    stated = folder.settings.get("group_size", -1)
    size = stated if type(stated) is int and 0 < stated <= columns else columns
    if not folder.has(f"{module}.g_idx"):
        if groups_of(columns, size) != groups:
            raise folder.refuse(
                f"{module} has scales of {groups} groups, where {columns} inputs in groups of {size} have "
                f"{groups_of(columns, size)}"
            )
        return None, size
    try:
        return column_order(folder.tensor(f"{module}.g_idx"), groups)
    except ValueError as error:
        raise folder.refuse(f"the index {module}.g_idx does not fit its layer: {error}") from None


def _zero_points(folder: ForeignFolder, module: str, out: int, bits: int) -> Tensor:
    """uint8 [groups, out]."""
    zeros = unpack_words(folder.tensor(f"{module}.qzeros"), out, bits)
    if _is_v2(folder):
        return zeros
    most = (1 << bits) - 1
    if bool((zeros == most).any()):
        folder.notes.append(
            f"zero points stored as {most} in format v1, first in {module}, are read as 0, as most programs do; some "
            f"read them as {most + 1}"
        )
    return (zeros + 1) & most  # of 8 bits the sum wraps by itself
