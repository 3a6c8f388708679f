"""Pyramid vector quantisation: vectors of D weights as an amplitude times a direction with D integers of sum |y_i| = K.

PVQ: Pyramid Vector Quantization for LLMs (arXiv 2410.16926). Of the paper only abstract, introduction and summaries
could be read; from those: coherence processing by a Hadamard rotation (a transform of its own here), search-free
encoding, amplitudes by the Beta law, a Hessian-aware extension. The rest is reconstructed: greedy pulses as in
classical pyramid quantisation (Fischer 1986), Lloyd-Max amplitude levels, the amplitude of least squared error,
vectors as the columns of a Hessian sweep. Defaults follow that reconstruction at 3.25 bits per weight.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, HeldWeight, SolveOptions, WeightSource, in_main_memory
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.methods.quantize.windows import WINDOW_MULTIPLE, quantize_windows
from featherweight.registry import register
from featherweight.storage.codes import Code, code_layout
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.pyramid import (
    LARGEST_DIMENSION,
    LARGEST_PULSES,
    WHOLE_ROW,
    Pyramid,
    Storage,
    level_values,
    pyramid_values,
    spec_groups,
)
from featherweight.storage.codes.pyramid_levels import LevelRule, amplitude_levels

PAIRS_AT_ONCE = 1 << 18  # pulse moves looked at together, in the cache


@register("grid", "pyramid")
class PyramidGrid(Grid):
    """Amplitude times a normalised point of the integer pyramid, for vectors of weights (see the module)."""

    portable: ClassVar[bool] = True
    group_size: int = Field(WHOLE_ROW, ge=1, le=WHOLE_ROW, description="columns that share a norm; 2^30: whole rows")
    dimension: int = Field(16, ge=1, le=LARGEST_DIMENSION, description="neighbouring weights a vector, D")
    pulses: int = Field(27, ge=1, le=LARGEST_PULSES, description="sum of the absolute integers of a vector, K")
    amplitude_bits: int = Field(4, ge=1, le=7, description="bits a vector's amplitude")
    levels_rule: LevelRule = Field(
        "lloyd-max", description="amplitude levels: least squared error, or equal probability"
    )
    gain: Literal["norm", "projection", "output"] = Field(
        "projection", description="amplitude: the norm, that of least squared error, or of least output error (gram)"
    )
    refine: bool = Field(True, description="after the greedy pulses move single pulses while the cosine rises")
    storage: Storage = Field("index", description="direction as one number a vector, or as its integers")
    scale_dtype: ScaleDtype = Field("auto", description="row norms; auto: float16, float32 where float16 would not do")

    @model_validator(mode="after")
    def _whole_vectors(self) -> PyramidGrid:
        if self.group_size != WHOLE_ROW and self.group_size % self.dimension:
            raise ValueError(f"group_size must be a multiple of dimension, {self.dimension}, or {WHOLE_ROW} for rows")
        return self

    @property
    def columns_jointly(self) -> int:
        return self.dimension

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.gain == "output" else ()

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        """`norms` [out, groups] as stored, and `columns` [out, groups], the widths of the groups."""
        return self._fit(weight, self._norm_dtype(HeldWeight(weight).largest, weight.shape[1]))

    def _fit(self, weight: Tensor, dtype: torch.dtype) -> Fit:
        groups = weight.double().split(self.group_size, dim=1)  # type: ignore[no-untyped-call]
        norms = torch.stack([group.square().sum(1).sqrt() for group in groups], 1)
        columns = torch.tensor([group.shape[1] for group in groups], device=weight.device).expand(len(weight), -1)
        return {"norms": norms.to(dtype), "columns": columns}

    def _norm_dtype(self, largest: float, columns: int) -> torch.dtype:
        """The dtype of the norms of groups with entries of at most `largest`."""
        if scale_dtype_for(self.scale_dtype, largest) == torch.float16:
            return scale_dtype_for(self.scale_dtype, largest * math.sqrt(min(columns, self.group_size)))
        return torch.float32

    def round_vectors(
        self, weight: Tensor, first: int, fit: Fit, statistics: Statistics = NO_STATISTICS
    ) -> tuple[Tensor, Fit]:
        """As in the base class, and for several vectors at once."""
        rows, count = weight.shape[0], weight.shape[1] // self.dimension
        vectors = weight.double().reshape(-1, self.dimension)
        points = nearest_points(vectors, self.pulses, self.refine)
        target = self._amplitudes(vectors.view(rows, count, -1), points.view(rows, count, -1), statistics.get("gram"))
        group_of = (first + torch.arange(count, device=weight.device) * self.dimension) // self.group_size
        norms, widths = fit["norms"][:, group_of], fit["columns"][:1].flatten()[group_of].tolist() if rows else []
        shares = (target / norms.double().clamp(min=torch.finfo(torch.float64).tiny)).T.contiguous()
        limits = [amplitude_levels(self.dimension, n, self.amplitude_bits, self.levels_rule).limits for n in widths]
        bounds = torch.tensor(limits, dtype=torch.float64, device=shares.device)
        amplitudes = torch.searchsorted(bounds, shares).to(torch.uint8).T.contiguous()
        levels = level_values(self.dimension, widths, self.amplitude_bits, self.levels_rule).to(weight.device)
        decoded = pyramid_values(points.view(rows, count, -1), amplitudes, norms, levels)
        return decoded.view(rows, -1), {"points": points.view(rows, -1).to(torch.int16), "amplitudes": amplitudes}

    def _amplitudes(self, vectors: Tensor, points: Tensor, gram: Tensor | None) -> Tensor:
        """The wished-for amplitudes, float64 [out, vectors]; `gram` is that of the columns of all vectors."""
        if self.gain == "norm":
            return vectors.square().sum(-1).sqrt()
        directions = points.double() / points.double().square().sum(-1, keepdim=True).clamp(min=1).sqrt()
        plain = (vectors * directions).sum(-1)
        if self.gain == "projection" or gram is None:
            return plain
        best = []
        for v in range(vectors.shape[1]):
            part = slice(v * self.dimension, (v + 1) * self.dimension)
            block = gram[part, part].double()
            size = len(block)  # below D in a last, padded vector
            seen = directions[:, v, :size] @ block
            power = (seen * directions[:, v, :size]).sum(1)
            wished = (seen * vectors[:, v, :size]).sum(1)
            best.append(torch.where(power > 0, wished / power.where(power > 0, 1.0), plain[:, v]))
        return torch.stack(best, 1)

    def levels(self, fit: Fit) -> Tensor:
        """For vectors of one weight, a scalar grid: plus or minus the amplitudes."""
        if self.dimension > 1:
            return super().levels(fit)
        widths = fit["columns"][:1].flatten().tolist()
        sizes = fit["norms"].float().unsqueeze(-1) * level_values(1, widths, self.amplitude_bits, self.levels_rule)
        return torch.cat([-sizes.flip(-1), sizes], -1)

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        if self.dimension > 1:
            return super().encode(indices, fit)
        half = 1 << self.amplitude_bits
        positive = indices >= half
        amplitudes = torch.where(positive, indices.int() - half, half - 1 - indices.int())
        points = torch.where(positive, self.pulses, -self.pulses)
        return self.join_vectors({"points": points, "amplitudes": amplitudes}, fit, (len(indices), indices.shape[1]))

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        return self.quantize_source(HeldWeight(weight), SolveOptions(), statistics)

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        dtype = self._norm_dtype(source.largest, source.shape[1])
        return quantize_windows(source, options, lambda window: self._quantize(window, dtype, statistics))

    def _quantize(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Code:
        fit = self._fit(weight, dtype)
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % self.dimension))
        parts = in_main_memory(self.round_vectors(padded, 0, fit, statistics)[1])
        return self.join_vectors(parts, in_main_memory(fit), (len(weight), weight.shape[1]))

    def join_vectors(self, parts: Fit, fit: Fit, shape: tuple[int, int]) -> Code:
        rows, columns = shape
        return Pyramid.encode(
            (parts["points"].view(rows, -1, self.dimension), parts["amplitudes"]),
            fit["norms"],
            columns,
            self.group_size,
            self.pulses,
            self.amplitude_bits,
            levels=self.levels_rule,
            storage=self.storage,
        )

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "pyramid",
            "shape": list(shape),
            **spec_groups(self.group_size),
            "dimension": self.dimension,
            "pulses": self.pulses,
            "amplitude_bits": self.amplitude_bits,
            "levels": self.levels_rule,
            "storage": self.storage,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        window = min(rows, options.window_rows(shape, 4, WINDOW_MULTIPLE)) * (columns + self.dimension)
        stored = sum(entry.nbytes for entry in code_layout(self.spec(shape)).values())
        # a window with ten float64 copies of it, pulse moves, indices; the result twice while it is joined
        return 84 * window + 40 * PAIRS_AT_ONCE + (32 << 20) + 2 * stored


def nearest_points(vectors: Tensor, pulses: int, refine: bool = True) -> Tensor:
    """Integer vectors of sum |y_i| = `pulses` that point nearly as `vectors` do: int64 [count, D]; 0 for zero vectors.

    vectors : float64 [count, D]

    The integer part of the vector scaled to the pyramid, then pulse by pulse where the cosine gains most; `refine` then
    moves one pulse at a time to another coordinate while the cosine rises.
    """
    sizes = vectors.abs()
    sizes = sizes / sizes.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    total = sizes.sum(1, keepdim=True)
    scaled = sizes * (pulses / total.where(total > 0, 1.0))
    points = scaled.floor()
    _take_surplus(points, scaled, pulses)
    _add_greedily(points, sizes, pulses)
    if refine:
        _move_pulses(points, sizes)
    signed = torch.where(vectors < 0, -points, points)
    return signed.long() * (total > 0)


def _take_surplus(points: Tensor, scaled: Tensor, pulses: int) -> None:
    """Where rounding errors made the integer parts add up to more than `pulses`, take from the least fraction."""
    surplus = (points.sum(1) > pulses).nonzero().squeeze(1)
    while len(surplus):
        fraction = (scaled[surplus] - points[surplus]).masked_fill(points[surplus] <= 0, torch.inf)
        points[surplus, fraction.argmin(1)] -= 1
        surplus = surplus[points[surplus].sum(1) > pulses]


def _add_greedily(points: Tensor, sizes: Tensor, pulses: int) -> None:
    missing = pulses - points.sum(1)
    active = ((missing > 0) & (sizes.amax(1) > 0)).nonzero().squeeze(1)
    while len(active):
        y, v = points[active], sizes[active]
        product = (v * y).sum(1, keepdim=True) + v
        place = (product.square() / (y.square().sum(1, keepdim=True) + 2 * y + 1)).argmax(1)
        points[active, place] += 1
        missing[active] -= 1
        active = active[missing[active] > 0]


def _move_pulses(points: Tensor, sizes: Tensor) -> None:
    """One-pulse moves i -> j, the best first, until none raises the cosine."""
    step = max(1, PAIRS_AT_ONCE // points.shape[1] ** 2)
    for first in range(0, len(points), step):
        active = torch.arange(first, min(len(points), first + step), device=points.device)
        while len(active):
            y, v = points[active], sizes[active]
            product, power = (v * y).sum(1), y.square().sum(1)
            less, gone = product.unsqueeze(1) - v, power.unsqueeze(1) - 2 * y + 1  # after taking one from i
            moved = (less.unsqueeze(2) + v.unsqueeze(1)).square() / (gone.unsqueeze(2) + 2 * y.unsqueeze(1) + 1)
            moved = moved.masked_fill((y <= 0).unsqueeze(2), -1.0)
            moved.diagonal(dim1=1, dim2=2).fill_(-1.0)
            best, place = moved.flatten(1).max(1)
            better = best > product.square() / power.clamp(min=1) * (1 + 1e-12)
            active, place = active[better], place[better]
            points[active, place // points.shape[1]] -= 1
            points[active, place % points.shape[1]] += 1
