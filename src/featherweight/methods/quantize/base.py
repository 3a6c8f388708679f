"""The five axes of the recipe space: transform x grid x rounding x correction x allocation.

A choice on an axis is a frozen pydantic model: its fields are its settings (validated where a recipe is read, printed
by `feather methods`), its methods the mathematics. Methods are pure: tensors and statistics in, `Code` out; no
devices, files, logging or progress inside.

Where the next one goes: `transforms/`, `grids/`, `rounding/` or `corrections/` beside this file, or `methods/budget/`;
one file with one `@register(axis, name)` class, and a preset in `recipes/`. See docs/adding-a-method.md.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics, restricted
from featherweight.methods.quantize.memo import Memo
from featherweight.model.network.access import BlockAccess, ModelAccess
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore


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

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics this choice declares (`methods/calibrate/statistics`); empty: data-free."""
        return ()

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes a transform or correction adds to the code of a matrix, as far as can be told without data."""
        return 0

    @property
    def training_bytes(self) -> int:
        """Bytes of memory for each weight trained, beside the network's float weights; 0: no training."""
        return 0

    @property
    def alters(self) -> bool:
        """Whether it changes plain tensors of blocks (norms, biases), so that nothing later has the original model."""
        return False

    def settings(self) -> dict[str, Any]:
        """`kind` and all settings, JSON-able."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


Fit = dict[str, Tensor]
"""Parameters of a fitted grid: tensors whose dimension 1 counts groups of columns, for example `scales` [out, groups].

The fits of neighbouring windows of columns, concatenated along dimension 1, are the fit of both windows together.
A tensor named `column_scales` is [1, groups, group_size] (ones behind the last column): see `Grid.column_scales`."""


def in_main_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a fit, or statistics, where codes are made and kept."""
    return {name: value.cpu() for name, value in tensors.items()}


class Grid(Choice):
    """The values a group of weights may take.

    A *scalar* grid gives every weight of a group the same short list of `levels`, and `encode` makes the code of chosen
    levels: this is all a rounding needs to know (sweeps, learned rounding, coordinate descent). A *vector* grid
    (`columns_jointly` > 1) rounds several neighbouring columns of a row at once with `round_vectors`.
    """

    portable: ClassVar[bool] = False
    """Whether `fit`, `levels`, `column_scales` and `round_vectors` take tensors of any device, and `quantize_source` a
    source whose rows are on one. What makes codes (`encode`, `join_vectors`) gets tensors in main memory."""
    device_weight_bytes: ClassVar[int] = 24  # a weight of a window, where PyTorch's form is at work on a device
    whole: ClassVar[bool] = False
    """Whether a matrix is taken as a whole: no levels of single weights, nor vectors, so that only `quantize` makes its
    code, and no rounding but `nearest` can have it."""
    group_size: int = Field(128, ge=1, description="input columns that share scales; the last group may be shorter")

    @property
    def columns_jointly(self) -> int:
        """Columns that are rounded together; 1 for scalar grids. May depend on settings."""
        return 1

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        """Parameters for a float32 weight [out, in], already rounded to what will be stored.

        `statistics` are those of just these columns. A grid uses what its settings ask for and can do without.
        """
        raise TypeError(f"grid {self.kind!r} cannot be fitted apart from rounding")

    def levels(self, fit: Fit) -> Tensor:
        """Allowed values of every group in ascending order: float32 [out, groups, levels]."""
        raise TypeError(f"grid {self.kind!r} has no finite list of levels")

    def column_scales(self, fit: Fit) -> Tensor | None:
        """Factors float32 [groups x group_size] of the columns beside the levels, or None; of a fit's `column_scales`.

        Where there are any, column j takes column_scales(fit)[j] times the levels of its group.
        """
        return fit["column_scales"].float().reshape(-1) if "column_scales" in fit else None

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        """The code in which weight [i, j] has the value levels(fit)[i, j // group_size, indices[i, j]].

        indices : uint8 [out, in]
        """
        raise TypeError(f"grid {self.kind!r} cannot encode chosen levels")

    def nearest(self, weight: Tensor, fit: Fit) -> Code:
        """Each weight to the nearest allowed value, to the lower level in a tie."""
        indices = nearest_levels(weight, self.levels(fit), self.group_size)
        return self.encode(indices.cpu(), in_main_memory(fit))

    def round_vectors(
        self, weight: Tensor, first: int, fit: Fit, statistics: Statistics = NO_STATISTICS
    ) -> tuple[Tensor, Fit]:
        """Vector grids: values float32 and their code parts for columns first to first + columns_jointly - 1.

        weight [out, columns_jointly] holds these columns, zeros behind the last column of the matrix; `fit` is that of
        the whole matrix. The parts of all windows are concatenated along dimension 1 and given to `join_vectors`.
        """
        raise TypeError(f"grid {self.kind!r} does not round vectors")

    def join_vectors(self, parts: Fit, fit: Fit, shape: tuple[int, int]) -> Code:
        """Vector grids: the code of a whole matrix from its parts."""
        raise TypeError(f"grid {self.kind!r} does not round vectors")

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        """Fit and round to nearest. Grids that do both at once override this."""
        fit = self.fit(weight, statistics)
        if self.columns_jointly == 1:
            return self.nearest(weight, fit)
        size, (_, columns) = self.columns_jointly, weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % size))
        parts = [
            self.round_vectors(padded[:, j : j + size], j, fit, restricted(statistics, j, min(j + size, columns)))[1]
            for j in range(0, columns, size)
        ]
        joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        return self.join_vectors(in_main_memory(joined), in_main_memory(fit), (weight.shape[0], columns))

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        """`quantize` of a source that may be larger than memory; grids that can, override this with windows."""
        rows = source.shape[0]
        code = self.quantize(source.rows(0, rows).float(), statistics)
        source.release(0, rows)
        return code

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        """The spec of the code a matrix of this shape gets; what planning counts bytes with."""
        raise TypeError(f"grid {self.kind!r} cannot be planned without data")

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        """An upper bound of the memory `quantize_source` takes beside the source's pages."""
        return 16 * shape[0] * shape[1]

    def device_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        """The same on a device, where PyTorch's form is at work, the source's rows included."""
        rows = min(shape[0], options.window_rows(shape, 4, 1))
        return max(self.working_bytes(shape, options), self.device_weight_bytes * rows * shape[1])


DEVICE_WINDOW = 128 << 20  # bytes of rows that go to a device at a time


class SolveOptions(BaseModel):
    """How to work, as opposed to what to compute: none of these changes a result, but another device the order of sums.

    device : where layers are solved whose grid and rounding are `portable`; weights, statistics and codes are in main
        memory before and after
    """

    model_config = ConfigDict(frozen=True)
    threads: int | None = None
    device: str = "cpu"
    window_bytes: int = 8 << 20
    backend: Literal["auto", "native", "reference"] = "auto"
    _memo: Memo = PrivateAttr(default_factory=lambda: Memo())

    def on(self, device: str) -> SolveOptions:
        """The same with another device; one that is not the CPU gets larger windows, which it needs to be busy."""
        window_bytes = self.window_bytes if device == "cpu" else max(self.window_bytes, DEVICE_WINDOW)
        return self.model_copy(update={"device": device, "window_bytes": window_bytes})

    @property
    def memo(self) -> Memo:
        return self._memo

    def window_rows(self, shape: tuple[int, int], itemsize: int, multiple: int) -> int:
        """Rows a window, a multiple of `multiple`, at least one multiple."""
        rows = self.window_bytes // max(1, shape[1] * itemsize) // multiple * multiple
        return max(multiple, rows)


def nearest_levels(weight: Tensor, levels: Tensor, group_size: int) -> Tensor:
    """Index of the nearest level of every weight, the lower one in a tie: uint8 [out, in].

    levels : float32 [out, groups, L], ascending; column j uses group j // group_size
    """
    rows, columns = weight.shape
    groups, count = levels.shape[1:]
    size = min(group_size, columns)
    padded = torch.nn.functional.pad(weight, (0, groups * size - columns)).reshape(rows * groups, size)
    flat = levels.reshape(rows * groups, count)
    middles = (flat[:, 1:] + flat[:, :-1]) / 2
    indices = torch.searchsorted(middles.contiguous(), padded.contiguous())
    return indices.to(torch.uint8).view(rows, groups * size)[:, :columns].contiguous()


Scope = Literal["layer", "block", "model"]
"""How much of the network a choice must see at once."""


class Rounding(Choice, abc.ABC):
    """Which allowed value each weight gets."""

    scope: ClassVar[Scope] = "layer"
    portable: ClassVar[bool] = False
    """Whether `quantize_source` and `quantize_reported` take a source and statistics on any device, with a grid that is
    `portable`. The code is in main memory in any case."""

    def refusal(self, grid: Grid) -> str | None:
        """Why this rounding cannot be used with a grid, as far as settings say so; None where it can."""
        return None

    @abc.abstractmethod
    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        """The code of a weight on `grid`. `statistics` holds what the recipe's choices declared in `needs`."""

    def quantize_reported(
        self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions
    ) -> tuple[Code, dict[str, Any]]:
        """`quantize_source` and what is worth recording of how it went (damping used, share of clipped codes)."""
        return self.quantize_source(source, grid, statistics, options), {}

    def quantize_block(
        self,
        session: BlockAccess,
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        options: SolveOptions,
        notify: Observer = silent,
        seed: int = 0,
    ) -> dict[str, Code]:
        """Scope "block": the codes of some layers of one block, chosen together.

        Parameters
        ----------
        session : the block; it is left as it was, and its caller puts the decoded codes in place
        grids : by layer, in order of execution; layers without a grid keep the weights they have
        statistics : by layer, what the recipe's choices declared in `needs`
        """
        raise TypeError(f"rounding {self.kind!r} is not one of blocks")

    def quantize_model(
        self,
        model: ModelAccess,
        grids: Mapping[str, Grid],
        options: SolveOptions,
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> dict[str, Code]:
        """Scope "model": the codes of all layers that have a grid, chosen together.

        store : where a training leaves its state, to go on from there in another process
        """
        raise TypeError(f"rounding {self.kind!r} is not one of whole models")


class Transform(Choice):
    """A function-preserving change of the network before rounding, with an exact inverse.

    *Layer* transforms change the basis of one layer's input: y = W x = (W T^-1)(T x). They make a `LayerTransform` for
    a layer; its code is wrapped so that `decode` gives W in the original basis and a kernel may apply T to x instead.
    *Block* transforms (scope "block") change weights of a block, and norms, in place, through `BlockAccess`.
    """

    scope: ClassVar[Scope] = "layer"
    portable: ClassVar[bool] = False
    """Whether `for_layer` takes a weight and statistics on any device. What it makes may say so of itself: see
    `LayerTransform`."""

    def refusal(self, anatomy: Anatomy) -> str | None:
        """Why a model cannot be transformed, as far as its structure says so; None where it can."""
        return None

    def layer_refusal(self, columns: int, role: str) -> str | None:
        """Why a layer of that many inputs, and of that `role` as in `for_layer`, cannot be transformed; or None."""
        return None

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        """The transform of one layer: float32 weight [out, in]; layers that share an input share the `seed`.

        role : "q_proj", "down_proj", ... as the model calls the layer
        """
        raise TypeError(f"transform {self.kind!r} is not one of single layers")

    def transform_block(
        self,
        session: BlockAccess,
        names: Sequence[str],
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        options: SolveOptions,
        notify: Observer = silent,
    ) -> dict[str, LayerTransform]:
        """Scope "block": change weights and norms through `session` so that the block's function stays the same.

        Statistics of `statistics` hold before the change. What no other tensor can absorb is returned as layer
        transforms, which the caller applies before rounding and wraps the codes with.
        """
        raise TypeError(f"transform {self.kind!r} is not one of blocks")

    def transform_model(self, model: ModelAccess, notify: Observer = silent, seed: int = 0) -> None:
        """Scope "model": change tensors through `model`, before anything is calibrated; the function stays the same."""
        raise TypeError(f"transform {self.kind!r} is not one of whole models")


class LayerTransform(Protocol):
    """A change of basis of one layer's input, fixed. invert(apply(W)) == W to float64 rounding.

    An attribute `key` (hashable), if there is one, is equal for equal transforms: what they carry over is then shared.
    One called `portable`, if it is true, says that tensors may be on any device, where the result is, too; the codes
    that `wrap` takes and gives are in main memory.
    """

    def apply(self, weight: Tensor) -> Tensor:
        """W T^-1 for W [out, in], in W's dtype."""
        ...

    def invert(self, weight: Tensor) -> Tensor:
        """W T, back from the transformed space."""
        ...

    def inputs(self, inputs: Tensor) -> Tensor:
        """T x for inputs [..., in]."""
        ...

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        """What calibration would have learned about T x (gram T H T', ...). Drops what cannot be carried over."""
        ...

    def wrap(self, code: Code) -> Code:
        """The code of the original weight, from the code of the transformed one."""
        ...


class Correction(Choice):
    """What is added beside the codes: a further term for the part of the weight that the code misses.

    Several corrections of layers are nested in their order: each splits what the one before left, and when that is
    rounded, the last corrects first.
    """

    scope: ClassVar[Scope] = "layer"
    portable: ClassVar[bool] = False
    """Whether `split` and `correct` take a weight and statistics on any device. Codes are in main memory."""

    def refusal(self, grid: Grid) -> str | None:
        """Why this correction cannot be used with a grid, as far as settings say so; None where it can."""
        return None

    def split(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Code | None]:
        """Before rounding: what is left for the grid, and a term stored beside it (sparse outliers), or None.

        The term need not add up with what is left: whatever is missing then is for `correct` to see to.
        """
        return weight, None

    def correct(self, weight: Tensor, code: Code, statistics: Statistics) -> Code:
        """After rounding: a code that stands for `code` plus the correction.

        weight : what `split` was given, before anything was taken from it: with one correction the whole weight
        code : that of what `split` left, with the term of `split` in it
        """
        return code

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], notify: Observer = silent, seed: int = 0
    ) -> dict[str, Code]:
        """Scope "block": better codes for layers of one block, whose session runs with the given ones or without.

        Called when all layers of the block are rounded; norms and biases may be set in the session.
        """
        raise TypeError(f"correction {self.kind!r} is not one of blocks")

    def after_group(
        self, session: BlockAccess, group: Sequence[str], codes: Mapping[str, Code], notify: Observer = silent
    ) -> dict[str, Code]:
        """Scope "block": called when the layers of a group, `session.groups[i]`, are rounded and in place, before the
        statistics of the next group are gathered. Returns the codes that it changes, of any layer rounded so far.
        """
        return {}

    def tune_model(
        self,
        model: ModelAccess,
        codes: Mapping[str, Code],
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> dict[str, Code]:
        """Scope "model": better codes, when all blocks are done. For `store` see `Rounding.quantize_model`."""
        raise TypeError(f"correction {self.kind!r} is not one of whole models")
