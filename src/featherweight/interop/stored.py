"""`StoredModel`: a folder of ours, or a plain one, as named matrices and vectors for whoever writes another format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD, module_layout, module_specs
from featherweight.storage.checkpoint.stored_code import read_code
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense

WINDOW_BYTES = 64 << 20
"""Of decoded float32 values at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model as the original's class names it, coded or plain.

    name : "model.layers.0.self_attn.q_proj.weight"
    shape : of the values
    dtype : of plain values; float32, what codes decode to, where there is a spec
    spec : of the code, None for plain values
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: dict[str, Any] | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    def code(self) -> Code:
        """What is stored; a matrix of plain values as `Dense`."""
        if self.spec is not None:
            return read_code(self.checkpoint, self.module, self.spec)
        return Dense(self.checkpoint.tensor(self.name))

    def values(self) -> Tensor:
        """All values: float32 of a code, else as they are stored (a view of the mapped file)."""
        return self.checkpoint.tensor(self.name) if self.spec is None else self.code().decode()

    def windows(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, last row, these rows): float32, some at a time, with the pages behind them given back."""
        if len(self.shape) < 2:
            yield 0, self.shape[0] if self.shape else 0, self.values().float()
            return
        row_bytes = 4 * (self.elements // max(1, self.shape[0]))
        step = max(1, WINDOW_BYTES // max(1, row_bytes))
        code = None if self.spec is None else self.code()
        for first in range(0, self.shape[0], step):
            last = min(self.shape[0], first + step)
            if code is not None:
                yield first, last, code.decode_rows(first, last)
            else:
                yield first, last, self.checkpoint.rows(self.name, first, last).float()
                self.checkpoint.release(self.name, first, last)


class StoredModel:
    """A model folder, open; a context manager that closes it.

    folder, config : as of the checkpoint; config without its quantization_config
    tensors : by name, in the order in which they are stored; a tied output layer that is not stored is not among them

    Raises
    ------
    CheckpointError
        The folder is none, or another tool's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        try:
            self.folder = self.checkpoint.folder
            self.config = {k: v for k, v in self.checkpoint.config.items() if k != "quantization_config"}
            self.tensors = self._tensors()
        except BaseException:
            self.checkpoint.close()
            raise

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.checkpoint.close()

    @property
    def coded(self) -> bool:
        """Whether anything in it is a code."""
        return any(tensor.spec is not None for tensor in self.tensors.values())

    @property
    def recipe(self) -> str:
        """Name of the recipe that made it, or an empty string."""
        found = (self.checkpoint.quantization_config or {}).get("recipe")
        return str(found.get("name", "")) if isinstance(found, dict) else ""

    def _tensors(self) -> dict[str, StoredTensor]:
        config = self.checkpoint.quantization_config
        if config is not None and config.get("quant_method") != METHOD:
            raise CheckpointError(
                f"{self.folder} is quantised by {str(config.get('quant_method'))[:40]!r}, which no importer here reads"
            )
        specs = {} if config is None else module_specs(config)
        owner = {f"{module}.{name}": module for module, spec in specs.items() for name in module_layout(module, spec)}
        found: dict[str, StoredTensor] = {}
        for name in self.checkpoint.names:
            module = owner.get(name)
            if module is None:
                entry = self.checkpoint.entry(name)
                found[name] = StoredTensor(self.checkpoint, name, tuple(entry.shape), entry.torch_dtype)
            elif f"{module}.weight" not in found:
                spec = specs[module]
                full = f"{module}.weight"
                found[full] = StoredTensor(self.checkpoint, full, tuple(spec["shape"]), torch.float32, spec)
        return found
