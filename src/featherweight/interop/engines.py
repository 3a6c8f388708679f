"""`Target`: whether a program runs a folder, and why not, said before any work."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar

from featherweight.interop.stored import StoredModel


@dataclass(frozen=True)
class Answer:
    """runs : whether the program runs the folder as it is, or once it is exported
    how : what to do: "as it is, with `import featherweight`", "feather export DIR --to gguf --out FILE"
    reasons : why not, or what is lost, a sentence each, naming tensor and number
    """

    runs: bool
    how: str
    reasons: tuple[str, ...] = field(default=())


class Target(abc.ABC):
    """A program that runs models. Registered with `@register("target", NAME)`."""

    kind: ClassVar[str]
    title: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def ask(cls, model: StoredModel, tensor_parallel: int = 1) -> Answer:
        """Answer from names, shapes and specs.

        tensor_parallel : processes among which rows or columns of each matrix are shared
        """
