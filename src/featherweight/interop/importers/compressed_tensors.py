"""compressed-tensors folders: integers, packed or one a byte, and 8-bit floats; the scheme of a layer in config.json.

A packed layer has `weight_packed` int32 [out, words], whose rows hold q + 2^(b-1), `weight_scale` [out, groups],
`weight_shape` [2], and where they apply `weight_zero_point` (packed along the outputs) and `weight_g_idx`. Of 3, 5, 6
and 7 bits older writers put floor(32 / b) values into a word, newer ones pack densely; the number of words tells which.
The other formats have `weight` of int8 or float8 and `weight_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.interop.bits import WORD, unpack_padded, unpack_words
from featherweight.interop.folders import FLOATS, ForeignFolder, Layers, has_part, method_of, read_folder
from featherweight.interop.grouping import column_order, spread
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register
from featherweight.storage.codes.base import dtype_name, groups_of
from featherweight.storage.codes.nested import index_dtype
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.uniform import Uniform

PACKED = "pack-quantized"
BY_BYTES = ("int-quantized", "float-quantized", "naive-quantized")
LAYERS = Layers(
    ".weight_scale",
    (".weight_packed", ".weight", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    tuple(f".{name}_{what}" for name in ("input", "output", "k", "v", "q") for what in ("scale", "zero_point")),
)


@dataclass(frozen=True)
class Scheme:
    """How weights of a group of layers are stored: what config.json says under `weights`, and the group's format."""

    format: str
    bits: int
    float: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None


@register("importer", "compressed-tensors")
class CompressedTensors(Importer):
    """compressed-tensors: integers exact, as uniform codes; 8-bit floats decoded in the type of their scales."""

    title = "compressed-tensors"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "compressed-tensors" and has_part(path, ".weight_packed", LAYERS.marker)

    @classmethod
    def open(cls, path: Path) -> Imported:
        return read_folder(path, LAYERS, _describe, _origin)


def _origin(folder: ForeignFolder) -> str:
    for key, harmless in (("sparsity_config", ("dense", None)), ("transform_config", ())):
        found = folder.settings.get(key)
        if found and not (isinstance(found, dict) and harmless and found.get("format") in harmless):
            named = found.get("format", "") if isinstance(found, dict) else ""
            raise folder.refuse(f"its quantization_config has a {key} {named}".rstrip() + ", which is not read")
    schemes = {scheme for _, scheme in _groups(folder)}
    if any(group.get("input_activations") for group in _group_entries(folder).values()):
        folder.notes.append("the source rounds activations, too: here they are as they are, only weights are rounded")
    if folder.settings.get("kv_cache_scheme"):
        folder.notes.append("the source's scheme for keys and values is not used")
    return "compressed-tensors, " + ", ".join(
        sorted(f"{scheme.format} {'float' if scheme.float else 'int'}{scheme.bits}" for scheme in schemes)
    )


def _group_entries(folder: ForeignFolder) -> dict[str, dict[str, Any]]:
    groups = folder.settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise folder.refuse("its quantization_config has no config_groups, which say how layers are stored")
    return groups


def _groups(folder: ForeignFolder) -> list[tuple[tuple[str, ...], Scheme]]:
    """(targets, scheme) of each group that has weights."""
    found = []
    for name, group in _group_entries(folder).items():
        targets = group.get("targets", ["Linear"])
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise folder.refuse(f"the targets of {name} in its quantization_config are {shown(targets)}")
        if group.get("weights") is not None:
            found.append((tuple(targets), _scheme(folder, name, group)))
    return found


def _scheme(folder: ForeignFolder, name: str, group: dict[str, Any]) -> Scheme:
    weights, format = group["weights"], group.get("format") or folder.settings.get("format")
    if format not in (PACKED, *BY_BYTES):
        raise folder.refuse(
            f"the format of {name} in its quantization_config is {shown(format)}, and only {PACKED}, "
            f"{', '.join(BY_BYTES)} are read"
        )
    weights = weights if isinstance(weights, dict) else {}
    bits, size, kind = weights.get("num_bits", 8), weights.get("group_size"), weights.get("type", "int")
    size = None if size == -1 else size
    block = weights.get("block_structure")
    valid = type(bits) is int and 1 <= bits <= 8 and kind in ("int", "float") and not (kind == "float" and bits != 8)
    valid = valid and (size is None or (type(size) is int and size > 0)) and not (kind == "float" and format == PACKED)
    valid = valid and (block is None or _is_block(block))
    strategy = weights.get("strategy") or ("group" if size else "channel" if "group_size" in weights else "tensor")
    if not valid or strategy not in ("tensor", "channel", "group", "block") or (strategy == "block" and block is None):
        raise folder.refuse(f"the weights of {name} in its quantization_config are {shown(weights, 200)}: not read")
    pair = (int(block[0]), int(block[1])) if block is not None else None
    return Scheme(format, bits, kind == "float", weights.get("symmetric", True) is not False, strategy, size, pair)


def _is_block(block: Any) -> bool:
    return isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def _scheme_of(folder: ForeignFolder, module: str) -> Scheme:
    """The scheme whose targets name a module, by its name or a pattern before a class."""
    groups = _groups(folder)
    for by_name in (True, False):
        for targets, scheme in groups:
            if any(_names(target, module) if by_name else _is_class_of(target, module) for target in targets):
                return scheme
    raise folder.refuse(f"no group of its quantization_config says how {module} is stored")


def _is_class_of(target: str, module: str) -> bool:
    """Whether a class, which has a capital letter and no dots, is that of a module: Embedding, or a linear layer."""
    if target.startswith("re:") or "." in target or target.islower():
        return False
    return ("embed" in module.rpartition(".")[2]) == target.endswith("Embedding")


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return module == target or module.endswith(f".{target}")
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        return False


def _describe(folder: ForeignFolder, module: str) -> ImportedTensor:
    scheme = _scheme_of(folder, module)
    packed = folder.has(f"{module}.weight_packed")
    if packed != (scheme.format == PACKED):
        raise folder.refuse(f"{module} is {'' if packed else 'not '}packed, other than its format {scheme.format} says")
    shape = _packed_shape(folder, module) if packed else _plain_shape(folder, module, scheme)
    if scheme.float:
        return _floats(folder, module, scheme, shape)
    return _integers(folder, module, scheme, shape)


def _packed_shape(folder: ForeignFolder, module: str) -> tuple[int, int]:
    folder.expect(f"{module}.weight_shape", folder.shape(f"{module}.weight_shape", 1, ("int64", "int32")), (2,))
    rows, columns = (int(n) for n in folder.tensor(f"{module}.weight_shape"))
    out, _ = folder.shape(f"{module}.weight_packed", 2, ("int32",))
    if rows != out or columns < 1:
        raise folder.refuse(
            f"{module}.weight_shape says [{rows}, {columns}], and {module}.weight_packed has {out} rows"
        )
    return rows, columns


def _plain_shape(folder: ForeignFolder, module: str, scheme: Scheme) -> tuple[int, int]:
    dtype = "float8_e4m3fn" if scheme.float else "int8"
    rows, columns = folder.shape(f"{module}.weight", 2, (dtype,))
    return rows, columns


def _block(folder: ForeignFolder, module: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale; the scales' shape is checked."""
    (rows, columns), name = shape, f"{module}.weight_scale"
    found = tuple(folder.checkpoint.entry(name).shape)
    if scheme.strategy == "tensor":
        if found not in ((), (1,), (1, 1)):
            raise folder.refuse(f"{name} has the shape {list(found)}, where its layer has one scale")
        return rows, columns
    if scheme.strategy == "channel":
        folder.expect(name, folder.shape(name, 2, FLOATS), (rows, 1))
        return 1, columns
    if scheme.strategy == "block" and scheme.block is not None:
        block = (min(rows, scheme.block[0]), min(columns, scheme.block[1]))
    elif scheme.group_size is None:
        raise folder.refuse(f"the strategy of {module} is group, and its quantization_config has no group_size")
    else:
        block = (1, min(columns, scheme.group_size))
    expected = (groups_of(rows, block[0]), groups_of(columns, block[1]))
    folder.expect(name, folder.shape(name, 2, FLOATS), expected)
    return block


def _scales(folder: ForeignFolder, module: str, scheme: Scheme) -> Tensor:
    """[blocks of rows, blocks of columns]."""
    found = folder.tensor(f"{module}.weight_scale")
    return found.reshape(1, 1) if scheme.strategy == "tensor" else found


def _floats(folder: ForeignFolder, module: str, scheme: Scheme, shape: tuple[int, int]) -> ImportedTensor:
    block = _block(folder, module, scheme, shape)
    dtype = folder.checkpoint.entry(f"{module}.weight_scale").torch_dtype

    def values() -> Tensor:
        scales = spread(_scales(folder, module, scheme).float(), shape, block)
        return folder.tensor(f"{module}.weight").float() * scales

    return folder.decoded(module, shape, dtype, values)


def _integers(folder: ForeignFolder, module: str, scheme: Scheme, shape: tuple[int, int]) -> ImportedTensor:
    rows, columns = shape
    block = _block(folder, module, scheme, shape)
    groups, size = groups_of(columns, block[1]), block[1]
    order = None
    if folder.has(f"{module}.weight_g_idx"):
        folder.expect(
            f"{module}.weight_g_idx", folder.shape(f"{module}.weight_g_idx", 1, ("int32", "int64")), (columns,)
        )
        index = folder.tensor(f"{module}.weight_g_idx")
        if int(index.max()) >= 0:  # -1 throughout: there is none
            try:
                order, size = column_order(index, groups)
            except ValueError as error:
                raise folder.refuse(f"the index {module}.weight_g_idx does not fit its layer: {error}") from None
    points = None if scheme.symmetric else _zero_points(folder, module, scheme, (rows, groups), block)
    dtype = folder.checkpoint.entry(f"{module}.weight_scale").torch_dtype
    inner = {
        "kind": "uniform", "bits": scheme.bits, "symmetric": points is None, "group_size": size,
        "scale_dtype": dtype_name(dtype),
    }  # fmt: skip
    _check_words(folder, module, scheme, columns)

    def code() -> Uniform | Permuted:
        codes = _codes(folder, module, scheme, columns)
        codes = codes if order is None else codes[:, order]
        scales = spread(_scales(folder, module, scheme), (rows, groups), (block[0], 1))
        made = Uniform.encode(codes, scales.contiguous(), points, scheme.bits, size, scale_dtype=dtype)
        return made if order is None else Permuted(made, order.to(index_dtype(columns)))

    full = {"shape": [rows, columns]}
    return folder.coded(module, inner | full if order is None else {"kind": "permuted", **full, "inner": inner}, code)


def _check_words(folder: ForeignFolder, module: str, scheme: Scheme, columns: int) -> None:
    if scheme.format == PACKED:
        words = folder.checkpoint.entry(f"{module}.weight_packed").shape[1]
        if words not in _word_counts(columns, scheme.bits):
            raise folder.refuse(
                f"{module}.weight_packed has {words} words a row, where {columns} values of {scheme.bits} bits take "
                + " or ".join(str(n) for n in sorted(set(_word_counts(columns, scheme.bits))))
            )


def _word_counts(count: int, bits: int) -> tuple[int, int]:
    """Words of `count` values, packed densely and with whole values in each word."""
    return -(-count * bits // WORD), -(-count // (WORD // bits))


def _unpack(words: Tensor, count: int, bits: int) -> Tensor:
    """uint8 [rows, count]; where both packings take as many words, they are told apart by the bits left empty."""
    dense, padded = _word_counts(count, bits)
    if WORD % bits == 0 or words.shape[1] != padded:
        return unpack_words(words, count, bits)
    if dense == padded and bool((words >> (WORD // bits * bits)).any()):
        return unpack_words(words, count, bits)
    return unpack_padded(words, count, bits)


def _codes(folder: ForeignFolder, module: str, scheme: Scheme, columns: int) -> Tensor:
    """uint8 [out, in], q + 2^(b-1)."""
    if scheme.format == PACKED:
        return _unpack(folder.tensor(f"{module}.weight_packed"), columns, scheme.bits)
    return _unsigned(folder.tensor(f"{module}.weight"), scheme.bits)


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    raised = signed.to(torch.int16) + (1 << (bits - 1))
    if int(raised.min()) < 0 or int(raised.max()) >> bits:
        raise ValueError(f"it has integers from {int(signed.min())} to {int(signed.max())}, not of {bits} bits")
    return raised.to(torch.uint8)


def _zero_points(
    folder: ForeignFolder, module: str, scheme: Scheme, stored: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """uint8 [out, groups], `stored`."""
    name = f"{module}.weight_zero_point"
    rows, groups = stored
    if scheme.format == PACKED and scheme.strategy in ("group", "channel"):
        words, found = folder.shape(name, 2, ("int32",))
        if words not in _word_counts(rows, scheme.bits) or found != groups:
            raise folder.refuse(
                f"{name} has the shape {[words, found]}, which does not fit {rows} rows, {groups} groups"
            )
        return _unpack(folder.tensor(name).T.contiguous(), rows, scheme.bits).T.contiguous()
    scales = _scales(folder, module, scheme)
    entry = folder.checkpoint.entry(name) if folder.has(name) else None
    if entry is None or entry.dtype not in ("I8", "I32") or entry.elements != scales.numel():
        raise folder.refuse(f"the tensor {name} is missing, or does not fit the scales of its layer")
    return spread(_unsigned(folder.tensor(name).reshape(scales.shape), scheme.bits), stored, (block[0], 1)).contiguous()
