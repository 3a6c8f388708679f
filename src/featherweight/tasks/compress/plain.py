"""Outputs in which nothing is coded: checkpoints like any other, which every tool reads and which can be compressed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.writer import Blob, blob_of
from featherweight.storage.run.store import Store

COPY_WINDOW = 16 << 20
DTYPE_FIELDS = ("dtype", "torch_dtype")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_plain(records: Iterable[dict[str, Any]], layers: Sequence[LinearLayer], added: Iterable[str]) -> bool:
    """Whether an output's layers are tensors that any reader understands.

    Parameters
    ----------
    records : Iterable[dict[str, Any]]
        Of the layers, in the order of `layers`.
    layers : Sequence[LinearLayer]
        Slices of one tensor must have one type among them.
    added : Iterable[str]
        Plain tensors that the source lacks. A bias among them is nothing that the model's class would ask for.
    """
    dtypes: dict[str, set[str]] = {}
    for record, layer in zip(records, layers, strict=True):
        if record["spec"]["kind"] != "dense":
            return False
        dtypes.setdefault(layer.tensor, set()).add(record["spec"]["dtype"])
    return all(len(found) == 1 for found in dtypes.values()) and not any(name.endswith(".bias") for name in added)


def plain_blob(store: Store, shape: tuple[int, ...], parts: Sequence[tuple[LinearLayer, str]]) -> Blob:
    """A tensor of the source in its own layout, from the dense codes of the layers it holds.

    Parameters
    ----------
    store : Store
    shape : tuple[int, ...]
        Of the tensor in the source: [out, in], [in, out], experts first, or with the sizes of a kernel behind.
    parts : Sequence[tuple[LinearLayer, str]]
        All layers of the tensor with the keys of their artifacts: one, or one for each expert of a stacked tensor.
    """
    ordered = sorted(parts, key=lambda part: part[0].expert or 0)
    layer, key = ordered[0]
    with store.open(key) as file:
        dtype, nbytes = file.entry("weight").dtype, file.entry("weight").nbytes
    return Blob(layer.tensor, dtype, shape, nbytes * len(ordered), partial(_windows, store, ordered))


def _windows(store: Store, parts: Sequence[tuple[LinearLayer, str]]) -> Iterator[memoryview]:
    """An artifact is open only while it is copied."""
    for layer, key in parts:
        with store.open(key) as file:
            if layer.transposed:
                yield from blob_of("weight", file.tensor("weight").t().contiguous()).chunks()
            else:
                yield from file.raw_windows("weight", COPY_WINDOW)


def with_true_dtype(config: dict[str, Any], stored: Iterable[torch.dtype]) -> dict[str, Any]:
    """A config.json whose dtype is one that holds every stored value: the widest there is, where they differ.

    A config that says nothing about types stays as it is; that of a part (`text_config`) changes with the whole.

    Parameters
    ----------
    config : dict[str, Any]
    stored : Iterable[torch.dtype]
        The types of all tensors; others than floating-point ones do not count.
    """
    found = set(stored) & set(FLOATS)
    if not found:
        return config
    widest = next(iter(found))
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    name = str(widest).removeprefix("torch.")

    def told(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: name
            if key in DTYPE_FIELDS and isinstance(value, str)
            else told(value)
            if isinstance(value, dict) and key.endswith("_config")
            else value
            for key, value in part.items()
        }

    return told(config)
