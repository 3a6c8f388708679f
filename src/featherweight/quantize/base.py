"""The five axes of the recipe space: transform x grid x rounding x correction x allocation.

A choice on an axis is a frozen pydantic model: its fields are its settings (validated where a recipe is read, printed
by `feather methods`), its methods the mathematics. Methods are pure: tensors and statistics in, `Code` out; no
devices, files, logging or progress inside.

Where the next one goes: `quantize/transforms/`, `quantize/grids/`, `quantize/rounding/`, `quantize/corrections/` or
`budget/`, one file with one `@register(axis, name)` class, and a preset in `recipes/`. See docs/adding-a-method.md.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featherweight.codes import Code


class WeightSource(Protocol):
    """A weight matrix that is read in windows of rows, so that none of it need be held."""

    shape: tuple[int, int]
    dtype: torch.dtype
    largest: float
    """Largest |weight|, finite."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [last - first, in_features] in the stored dtype; valid until released."""
        ...

    def release(self, first: int, last: int) -> None:
        """The rows will not be looked at again soon: give their memory back."""
        ...


class HeldWeight:
    """A `WeightSource` over a tensor in memory."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.largest = float(weight.detach().abs().amax()) if weight.numel() else 0.0

    def rows(self, first: int, last: int) -> Tensor:
        return self.weight[first:last]

    def release(self, first: int, last: int) -> None:
        pass


class Choice(BaseModel):
    """A point on one axis: `kind` is the registered name, the fields are the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the statistics this choice declares; empty means data-free."""

    def settings(self) -> dict[str, Any]:
        """`kind` and all settings, JSON-able."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


Fit = dict[str, Tensor]
"""Parameters of a fitted grid: tensors per group, for example `scales` [out, groups]."""


class Grid(Choice):
    """The values a group of weights may take."""

    group_size: int = Field(128, ge=1, description="input columns that share scales; the last group may be shorter")

    def fit(self, weight: Tensor) -> Fit:
        """Parameters for a float32 weight [out, in], already rounded to what will be stored."""
        raise TypeError(f"grid {self.kind!r} cannot be fitted apart from rounding")

    def levels(self, fit: Fit) -> Tensor:
        """Allowed values of every group in ascending order: float32 [out, groups, levels]."""
        raise TypeError(f"grid {self.kind!r} has no finite list of levels")

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        """Each weight to the nearest allowed value."""
        raise TypeError(f"grid {self.kind!r} cannot round to nearest")

    def quantize(self, weight: Tensor) -> Code:
        """Fit and round to nearest. Grids that do both at once override this."""
        return self.nearest(weight, self.fit(weight))

    def quantize_source(self, source: WeightSource, options: SolveOptions) -> Code:
        """`quantize` of a source that may be larger than memory; grids that can, override this with windows."""
        rows = source.shape[0]
        code = self.quantize(source.rows(0, rows).float())
        source.release(0, rows)
        return code

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        """The spec of the code a matrix of this shape gets; what planning counts bytes with."""
        raise TypeError(f"grid {self.kind!r} cannot be planned without data")

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        """An upper bound of the memory `quantize_source` takes beside the source's pages."""
        return 16 * shape[0] * shape[1]


class SolveOptions(BaseModel):
    """How to work, as opposed to what to compute: none of these changes a result."""

    model_config = ConfigDict(frozen=True)
    threads: int | None = None
    window_bytes: int = 8 << 20
    backend: Literal["auto", "native", "reference"] = "auto"

    def window_rows(self, shape: tuple[int, int], itemsize: int, multiple: int) -> int:
        """Rows a window, a multiple of `multiple`, at least one multiple."""
        rows = self.window_bytes // max(1, shape[1] * itemsize) // multiple * multiple
        return max(multiple, rows)


class Rounding(Choice, abc.ABC):
    """Which allowed value each weight gets."""

    @abc.abstractmethod
    def quantize_source(
        self, source: WeightSource, grid: Grid, statistics: Mapping[str, Tensor], options: SolveOptions
    ) -> Code:
        """The code of a weight on `grid`. `statistics` holds what the recipe's choices declared in `needs`."""


class Transform(Choice, abc.ABC):
    """A function-preserving change of the network before rounding, with an exact inverse.

    `invert(apply(W)) == W` to float64 rounding. What the transform asks of a layer's input is applied by the runner
    that gathers statistics; the data-free run does not transform and refuses recipes that do.
    """

    @abc.abstractmethod
    def apply(self, weight: Tensor) -> Tensor:
        """The weight of a layer in the transformed space."""

    @abc.abstractmethod
    def invert(self, weight: Tensor) -> Tensor:
        """Back from the transformed space."""


class Correction(Choice, abc.ABC):
    """What is added beside the codes: a further term for the part of the weight that the code misses."""

    @abc.abstractmethod
    def correct(self, weight: Tensor, code: Code, statistics: Mapping[str, Tensor]) -> Code:
        """A code that stands for `code` plus the correction."""


class Allocator(Choice, abc.ABC):
    """How much each layer gets."""

    @abc.abstractmethod
    def assign(self, shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, Grid]) -> dict[str, Grid]:
        """The grid of every layer, from its shape and the grid that the recipe and its overrides name for it."""
