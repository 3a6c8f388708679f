"""What the exporters of quantised folders share: which layers become integers, which plain values.

A layer whose code is integers with scales (`integers.py`) becomes the format's own; embedding and output layer, which
these formats keep plain, are decoded; any other code is refused unless `decode` is set.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import OutputError
from featherweight.interop.exports import Exporter, Told, Verdict
from featherweight.interop.folder_writing import (
    NO_BIAS,
    STACKED,
    Part,
    Places,
    Rounding,
    given_bias,
    places_of,
    plain_part,
    with_error,
    write_config,
    write_folder,
)
from featherweight.interop.fused import unlike
from featherweight.interop.integers import Grid, Integers, grid_of, integers_of
from featherweight.interop.stored import StoredModel, StoredTensor
from featherweight.storage.codes import describe_code
from featherweight.storage.codes.base import dtype_name

SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}
PlainType = Literal["auto", "bfloat16", "float16", "float32"]
CODES, SCALES = ("weight_packed", "qweight"), ("weight_scale", "scales")
"""What the formats call the integers of a layer, and their scales."""
OUTSIDE = "the format keeps embedding and output layer plain"


def short_name(dtype: torch.dtype) -> str:
    """ "bf16"."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def model_dtype(model: StoredModel) -> torch.dtype:
    """The type in which config.json says that the model computes; bfloat16 where it does not."""
    named = model.config.get("dtype", model.config.get("torch_dtype"))
    found = getattr(torch, named, None) if isinstance(named, str) else None
    return found if found in (torch.float16, torch.float32) else torch.bfloat16


class QuantisedExporter(Exporter):
    """See the module."""

    decode: bool = Field(
        False, description="write layers whose codes the format cannot hold as plain values, instead of refusing them"
    )
    dtype: PlainType = Field(
        "auto",
        description="type of plain values and of the model in config.json; auto: as they are stored, and what is "
        "decoded in the model's own",
    )
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16,)
    """Types of scales that the format has; others are rounded to the first."""

    @abc.abstractmethod
    def unfit(self, grid: Grid) -> str:
        """Why the format has no place for such a matrix; an empty string where it has one."""

    @abc.abstractmethod
    def layouts(self, grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor of a layer, by its name behind the layer's."""

    @abc.abstractmethod
    def stored(self, grid: Grid, integers: Integers, which: str) -> Tensor:
        """One of these tensors. ValueError where a value has no place in the format."""

    @abc.abstractmethod
    def settings(self, grids: Mapping[str, Grid], plain: Sequence[str]) -> dict[str, Any]:
        """The quantization_config. grids : by module; plain : linear modules that are not quantised."""

    def unlike(self, grids: Mapping[str, Grid]) -> dict[str, str]:
        """Why layers cannot be quantised beside the others, by name; for formats with one scheme for all."""
        return {}

    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        places = places_of(model)
        grids, refused = self._sorted(model, places)
        biased = given_bias(model)
        found = []
        odd = {f"{module}.weight": said for modules, said in unlike(model) for module in modules}
        for name, tensor in model.tensors.items():
            if name in biased:
                found.append(Verdict(name, "nothing", "impossible", 0.0, NO_BIAS))
                continue
            verdict = self._verdict(model, tensor, grids.get(name), refused.get(name, ""), name in places.outside)
            found.append(replace(verdict, why=odd[name]) if name in odd and not verdict.why else verdict)
        return tuple(found)

    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        places = places_of(model)
        grids, _ = self._sorted(model, places)
        roundings = {name: Rounding() for name in model.tensors}
        parts = []
        for name, tensor in model.tensors.items():
            grid, size = grids.get(name), tensor.elements * tensor.dtype.itemsize
            if grid is None:
                turned = tensor.spec is not None and name in places.transposed
                parts.append((size, [plain_part(tensor, self._plain(model, tensor), roundings[name], turned)]))
            else:
                parts.append((size, self._parts(tensor, grid, roundings[name])))
        write_folder(model, out, parts, told)
        modules = {name.removesuffix(".weight"): grid for name, grid in grids.items()}
        plain = [name.removesuffix(".weight") for name in sorted((places.linear | places.outside) - set(grids))]
        changes: dict[str, Any] = {"quantization_config": self.settings(modules, plain)} if grids else {}
        if self.dtype != "auto":
            changes["dtype" if "dtype" in model.config else "torch_dtype"] = self.dtype
        write_config(model, out, changes)
        return [with_error(verdict, roundings[verdict.tensor]) for verdict in self.verdicts(model)]

    def _sorted(self, model: StoredModel, places: Places) -> tuple[dict[str, Grid], dict[str, str]]:
        """Grids of the tensors that go in as integers, and why others do not."""
        grids: dict[str, Grid] = {}
        refused: dict[str, str] = {}
        for name, tensor in model.tensors.items():
            if tensor.spec is None or name in places.outside:
                continue
            grid = grid_of({k: v for k, v in tensor.spec.items() if k != "bias"})
            reason = f"{describe_code(tensor.spec)} is no integers with scales" if grid is None else self.unfit(grid)
            if "[" in tensor.module:
                reason = STACKED
            elif name in places.transposed:
                reason = "the model's class keeps it transposed"
            if grid is None or reason:
                refused[name] = reason
            else:
                grids[name] = grid
        others = self.unlike(grids)
        return {name: grid for name, grid in grids.items() if name not in others}, refused | others

    def _verdict(
        self, model: StoredModel, tensor: StoredTensor, grid: Grid | None, reason: str, outside: bool
    ) -> Verdict:
        if grid is not None:
            size = sum(Part("", dtype, shape, tuple).nbytes for dtype, shape in self.layouts(grid).values())
            bits = 8 * size / max(1, tensor.elements)
            if grid.scale_dtype in self.scale_dtypes:
                return Verdict(tensor.name, grid.text, "exact", bits)
            why = f"its scales are {dtype_name(grid.scale_dtype)}, the format's {dtype_name(self.scale_dtypes[0])}"
            return Verdict(tensor.name, grid.text, "rounded", bits, why)
        dtype = self._plain(model, tensor)
        if tensor.spec is None:
            wide = dtype == tensor.dtype or dtype.itemsize > tensor.dtype.itemsize
            fate: Literal["exact", "rounded"] = "exact" if wide else "rounded"
            why = "" if wide else f"it is {short_name(tensor.dtype)}"
            return Verdict(tensor.name, short_name(dtype), fate, 8 * dtype.itemsize, why)
        if "[" in tensor.module or not (outside or self.decode):
            advice = "" if "[" in tensor.module else f": --set decode=true writes it as plain {short_name(dtype)}"
            return Verdict(tensor.name, short_name(dtype), "impossible", 8 * dtype.itemsize, reason + advice)
        return Verdict(tensor.name, short_name(dtype), "rounded", 8 * dtype.itemsize, OUTSIDE if outside else reason)

    def _plain(self, model: StoredModel, tensor: StoredTensor) -> torch.dtype:
        if self.dtype != "auto" and (tensor.spec is not None or tensor.dtype.is_floating_point):
            return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.dtype, torch.float32)
        return tensor.dtype if tensor.spec is None else model_dtype(model)

    def _parts(self, tensor: StoredTensor, grid: Grid, rounding: Rounding) -> list[Part]:
        def make(which: str) -> Callable[[], list[Tensor]]:
            def chunks() -> list[Tensor]:
                measured = which in SCALES and grid.scale_dtype not in self.scale_dtypes
                integers = integers_of(tensor.code(), codes=which in CODES or measured)
                if grid.scale_dtype not in self.scale_dtypes:
                    rounded = integers.scales.to(self.scale_dtypes[0])
                    if measured:
                        _measure(tensor.name, integers, rounded, grid, rounding)
                    integers = Integers(integers.codes, rounded, integers.zero_points, integers.index)
                try:
                    return [self.stored(grid, integers, which)]
                except ValueError as error:
                    raise OutputError(f"{tensor.name} cannot be written as {self.title}: {error}") from None

            return chunks

        return [
            Part(f"{tensor.module}.{which}", dtype, shape, make(which))
            for which, (dtype, shape) in self.layouts(grid).items()
        ]


def _measure(name: str, integers: Integers, rounded: Tensor, grid: Grid, rounding: Rounding) -> None:
    """Add what rounding the scales does; OutputError where they are beyond the type."""
    if not bool(rounded.isfinite().all()):
        raise OutputError(f"{name}: its scales reach {float(integers.scales.abs().max()):g}, beyond {rounded.dtype}")
    zeros = 1 << (grid.bits - 1) if integers.zero_points is None else integers.zero_points.long()
    place = integers.index.long() if integers.index is not None else torch.arange(grid.shape[1]) // grid.group_size
    points = zeros if isinstance(zeros, int) else zeros[:, place]
    signed = (integers.codes.long() - points).float()
    rounding.add(signed * integers.scales.float()[:, place], signed * rounded.float()[:, place])


def commonest(grids: Mapping[str, Grid], key: Callable[[Grid], Any]) -> Any:
    """What most layers have, of all weights, the first of equals."""
    counts: Counter[Any] = Counter()
    for grid in grids.values():
        counts[key(grid)] += grid.shape[0] * grid.shape[1]
    return counts.most_common(1)[0][0] if counts else None
