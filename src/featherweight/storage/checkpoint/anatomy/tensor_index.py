"""What an anatomy is read from: names, shapes and a configuration; a Checkpoint, or another view of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

FLOATING = {"F64", "F32", "F16", "BF16"}
"""Types of weights, as safetensors names them."""


class Described(Protocol):
    """One tensor; `dtype` as safetensors names it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def elements(self) -> int: ...


class Located(Protocol):
    """The file of a tensor, for error texts."""

    @property
    def path(self) -> Path: ...


class TensorIndex(Protocol):
    """Tensors by name, and the content of config.json."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    def entry(self, name: str) -> Described: ...
    def file_of(self, name: str) -> Located: ...
    def differ(self, one: str, other: str) -> bool: ...
