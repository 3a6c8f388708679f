"""`Exporter`: a folder of ours, or a plain one, in another tool's format; what each tensor becomes is said first."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from featherweight.errors import OutputError, RecipeError
from featherweight.interop.stored import StoredModel
from featherweight.registry import find, nearest

Fate = Literal["exact", "rounded", "impossible"]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Verdict:
    """What one tensor becomes.

    tensor : its name in the folder
    becomes : in the format's own words, "Q4_0", "W4A16 groups of 128", "bf16"
    fate : `exact`, the very same values; `rounded`, others (`error` after writing); `impossible`, with `why`
    bits : per weight as it will be stored, all counted
    why : for whatever is not exact, one clause
    error : |W' - W| / |W| in the Frobenius norm, once it is known; 0 where exact
    """

    tensor: str
    becomes: str
    fate: Fate
    bits: float
    why: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    path : the file or folder
    verdicts : of all tensors, with errors
    bytes : of all files
    """

    path: Path
    verdicts: tuple[Verdict, ...]
    bytes: int


class Exporter(BaseModel, abc.ABC):
    """A format that is written. Registered with `@register("exporter", NAME)`; its fields are its settings.

    title : what people call the format
    is_file : OUT is one file, not a folder
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]
    title: ClassVar[str]
    is_file: ClassVar[bool] = False

    @abc.abstractmethod
    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        """What each tensor becomes, from names, shapes and specs; nothing large is read. Raises CheckpointError where
        the format has no place for such a model at all."""

    @abc.abstractmethod
    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        """Write into `out`: a path that does not exist (a file), or an empty folder that will be renamed when this
        returns. One tensor in memory. Returns the verdicts with errors. told : called with (done, all) bytes read."""


def exporter_named(name: str, settings: dict[str, Any]) -> Exporter:
    """The exporter with its settings. RecipeError that names the nearest format or setting where there is none."""
    cls: type[Exporter] = find("exporter", name)
    unknown = [key for key in settings if key not in cls.model_fields]
    if unknown:
        known = ", ".join(cls.model_fields) or "none"
        raise RecipeError(
            f"{name} has no setting {unknown[0]!r}{nearest(unknown[0], cls.model_fields)}; settings: {known}"
        )
    try:
        return cls(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or name
        reason = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{name}: {place} is {str(first.get('input'))[:80]!r}: {reason}") from None


def refuse_impossible(verdicts: Sequence[Verdict], format: str) -> None:
    """OutputError that names the first tensor which the format cannot hold, and how many others."""
    lost = [verdict for verdict in verdicts if verdict.fate == "impossible"]
    if lost:
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise OutputError(f"{lost[0].tensor}{others} cannot be written as {format}: {lost[0].why}")
