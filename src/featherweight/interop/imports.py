"""`Importer`: how another tool's model is described, tensor by tensor, so that it can be written as a folder of ours.

An importer describes and loads; names are those of the Hugging Face family, values are exact: a code of ours where one
stands for the very numbers that the other tool's block stands for, else plain values. `imported.py` writes the folder,
`cache.py` keeps it, and every command goes on from there as with any other model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.storage.codes import Code, code_layout


@dataclass(frozen=True)
class ImportedTensor:
    """One tensor of the model.

    name : as checkpoints of the family have it, "model.layers.0.self_attn.q_proj.weight"
    shape : of the values
    load : gives the `Code` where there is a spec, else the values as a tensor of `dtype`; called once
    dtype : of plain values
    spec : of the code (with `shape`), or None for plain values
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Code | Tensor]
    dtype: torch.dtype = torch.bfloat16
    spec: dict[str, Any] | None = None

    @property
    def module(self) -> str:
        """The name of the module of which this is the weight."""
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the folder."""
        if self.spec is None:
            return math.prod(self.shape) * self.dtype.itemsize
        return sum(layout.nbytes for layout in code_layout(self.spec).values())


@dataclass(frozen=True)
class Imported:
    """A model of another format, opened: all that is needed to write it as a folder of ours.

    config : content of config.json, without a quantization_config
    tensors : in the order in which they are to be stored
    origin : what the source is, in a few words: "GGUF, Q4_1, llama"
    write_beside : writes what belongs beside the weights (tokenizer, templates, generation config) into a folder
    notes : what is odd about the source, a sentence each
    close : gives files back
    """

    config: dict[str, Any]
    tensors: tuple[ImportedTensor, ...]
    origin: str
    write_beside: Callable[[Path], None]
    notes: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=lambda: None)


class Importer(abc.ABC):
    """A format that is read. Registered with `@register("importer", NAME)`.

    title : what people call the format
    revision : rises whenever the same source would be read otherwise than before, so that what is in the cache is
        made anew
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    revision: ClassVar[int] = 1

    @classmethod
    @abc.abstractmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        """Whether a file or folder is of this format, from its name, its first bytes or `config`, the content of the
        folder's config.json (empty for a file). Says no rather than fail."""

    @classmethod
    @abc.abstractmethod
    def open(cls, path: Path) -> Imported:
        """Describe the model. CheckpointError, in one sentence, for whatever cannot be read."""

    @classmethod
    def files(cls, path: Path) -> tuple[Path, ...]:
        """What the model is made of, by which a change is noticed: the file, or all files of the folder."""
        return (path,) if path.is_file() else tuple(sorted(p for p in path.iterdir() if p.is_file()))
