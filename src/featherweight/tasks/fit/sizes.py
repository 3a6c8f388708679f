"""Bytes of a model's weight files before they are written: headers, copied tensors, codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_layout
from featherweight.storage.checkpoint.writer import DTYPE_CODES, Blob, header_bytes
from featherweight.tasks.compress.plan import Plan


def file_bytes(plan: Plan, checkpoint: Checkpoint, specs: Mapping[str, dict[str, Any]]) -> int:
    """Of all weight files of an output in which the layers have codes of these specs (with `shape`), by name.

    Exact for one file; several have a few hundred bytes more.
    """
    blobs = [*_copied(plan, checkpoint), *_coded(specs)]
    return header_bytes(blobs, {}) + sum(blob.nbytes for blob in blobs)


def _copied(plan: Plan, checkpoint: Checkpoint) -> Iterator[Blob]:
    for name in plan.copied:
        entry = checkpoint.entry(name)
        yield Blob(name, entry.dtype, tuple(entry.shape), entry.nbytes, _nothing)


def _coded(specs: Mapping[str, dict[str, Any]]) -> Iterator[Blob]:
    for module, spec in specs.items():
        for name, layout in module_layout(module, spec).items():
            yield Blob(f"{module}.{name}", DTYPE_CODES[layout.dtype], tuple(layout.shape), layout.nbytes, _nothing)


def _nothing() -> Iterable[memoryview]:
    return ()
