"""One sweep over the columns of a weight matrix under the second moment H of its input, whose settings are GPTQ,
GPTAQ, ResComp and FOEM.

* GPTQ (Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323): columns are
  rounded one after another; the error of each goes into those not yet rounded. Its published presets are the defaults.
* GPTAQ (arXiv 2504.02692): `alpha` feeds in what the inputs X have lost against the original network's, X~; P is the
  published per-neuron approximation, `target: shift` the exact solution W* = W (I + alpha D H_d^-1), then GPTQ.
* ResComp (arXiv 2604.07955; reconstructed in part, from code and secondary sources): `residual_compensation` feeds back
  the difference of original and compensated weight, in the card's simplified form, which equals the published one.
* PT2-LLM (arXiv 2510.03267; how its authors' sweep does it could not be read): `order: similarity` chooses the columns
  of every group as the sweep reaches it, of those that remain, as they are then; see similarity.py.
* FOEM (arXiv 2507.11017; the paper's text was not at hand): `shrink` with `pull_back`. Its third variant, with a
  gradient that leaves H out, is not offered.

A group's grid is fitted to the working copy as its first column is reached (the authors' code looks at a stale copy
inside a block of columns), with the scales as they will be stored. A *vector* grid rounds several columns J at once,
E = (V - V^) U_JJ^-1. All is done in the weight's dtype: float32, or float64 for tests of exact identities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, SolveOptions, in_main_memory
from featherweight.methods.quantize.scales import scale_dtype_for
from featherweight.methods.quantize.similarity import Remaining, most_similar, with_first
from featherweight.methods.quantize.sweep_factor import (
    WHOLE_GROUPS,
    Attempt,
    Factor,
    FactorSettings,
    Piece,
    factorise,
    order_of_columns,
)
from featherweight.methods.quantize.sweep_rows import RowFeedback
from featherweight.methods.quantize.sweep_steps import (
    SweepState,
    blocks,
    counted,
    joined,
    ordered,
    push,
    push_tail,
    sweep_segment,
)
from featherweight.native.sweep import FeedbackRule, SweptColumns
from featherweight.storage.codes import Code
from featherweight.storage.codes.permuted import Permuted


class SweepSettings(FactorSettings):
    """Settings of the sweep; see the module."""

    alpha: float = Field(0.0, ge=0, description="GPTAQ: weight of the full-precision stream's residual")
    target: Literal["per-neuron", "shift"] = Field("per-neuron", description="GPTAQ as published, or its exact form")
    residual_compensation: float = Field(0.0, ge=0, description="ResComp: alpha_2, weight of original minus current")
    shrink: float = Field(0.0, ge=0, le=1, description="FOEM: beta, shrinkage of compensated weights to the original")
    pull_back: Literal["none", "next-column", "all-columns"] = Field(
        "next-column", description="FOEM: columns that shrink pulls back: none, the next (GPTQModel), all (literal)"
    )
    tail: Literal["pre", "rounded", "clamped"] = Field(
        "pre", description="residuals behind a block use weights before rounding, rounded, or clamped to the grid"
    )
    groups: Literal["dynamic", "static"] = Field(
        "dynamic", description="grids fitted to compensated weights on the way, or to the original ones beforehand"
    )
    block_size: int = Field(128, ge=1, description="columns between updates of the whole rest; changes speed only")

    @model_validator(mode="after")
    def _order_goes_with_the_rest(self) -> SweepSettings:
        if self.order == "similarity" and self.groups == "static":
            raise ValueError("order similarity makes groups on the way: set groups to dynamic")
        if self.order == "similarity" and self.needs_cross and self.target == "per-neuron":
            raise ValueError("order similarity has no per-neuron residual of later columns: set target to shift")
        return self

    @property
    def stores_order(self) -> bool:
        """Whether the columns of a group lie apart in the matrix, so that their order is stored."""
        return self.order == "similarity" or (self.order == "activation" and self.groups == "dynamic")

    @property
    def needs_cross(self) -> bool:
        return self.alpha > 0

    @property
    def rule(self) -> FeedbackRule:
        pull_back = self.pull_back if self.shrink else "none"
        alpha = self.alpha if self.target == "per-neuron" else 0.0
        return FeedbackRule(alpha, self.residual_compensation, self.shrink, pull_back, self.tail)


@dataclass(frozen=True)
class SweepResult:
    """A code and how the sweep went. loss is tr((W - Q) H_d (W - Q)') in units of the statistics, per token."""

    code: Code
    loss: float
    damping: float
    attempts: tuple[Attempt, ...]
    clipped: float  # share of weights more than half a step outside their group's range
    drift: float  # largest |w - w0| at the moment of rounding
    data_free: bool
    note: str

    def report(self) -> dict[str, Any]:
        """JSON-able, for a layer's record."""
        found: dict[str, Any] = {"sweep_loss": self.loss, "damping": self.damping, "clipped": self.clipped}
        found["drift"] = self.drift
        if self.data_free:
            found["fallback"] = "data-free"
            found["reason"] = self.note
        elif self.note:
            found["note"] = self.note
        return found


class Sweeper:
    """The sweep over all layers that share an input: factorises once.

    statistics : `gram`, `cross` if the settings need it, and whatever the grid asks for (see `restricted`)
    factors : where factors are kept, for callers that want to keep them without the statistics
    """

    def __init__(
        self, statistics: Statistics, settings: SweepSettings, factors: dict[int, Factor] | None = None
    ) -> None:
        self.statistics = statistics
        self.settings = settings
        self._factors: dict[int, Factor] = {} if factors is None else factors

    def factor(self, group_size: int) -> Factor:
        """The factor for grids of this group size, made at first use."""
        key = group_size if self.settings.order in WHOLE_GROUPS else 0
        if key not in self._factors:
            permutation = order_of_columns(self.statistics["gram"], self.settings.order, group_size)
            feedback = self.settings.needs_cross and self.settings.target == "per-neuron"
            self._factors[key] = factorise(self.statistics, self.settings, permutation, feedback)
        return self._factors[key]

    def run(
        self,
        weight: Tensor,
        grid: Grid,
        options: SolveOptions | None = None,
        statistics: Statistics | None = None,
        rows: RowFeedback | None = None,
    ) -> SweepResult:
        """Sweep weight [out, in], which is not changed.

        `statistics`: for the grid's fit, where a layer has its own beside the shared ones (default: the shared ones).
        `rows`: feedback between rows, for plain settings and grids of single weights; the loss is then that of both
        sides.
        Raises ValueError if the weight and the statistics do not fit together.
        """
        options = options or SolveOptions()
        own = self.statistics if statistics is None else statistics
        missing = [
            n for n in ("gram", "cross") if n not in self.statistics and (n == "gram" or self.settings.needs_cross)
        ]
        if missing:
            return data_free(weight, grid, own, options, f"there is no calibration statistic {missing[0]!r}")
        if self.statistics["gram"].shape[0] != weight.shape[1]:
            raise ValueError(
                f"the second moment has {self.statistics['gram'].shape[0]} inputs, the weight {weight.shape[1]}"
            )
        if grid.columns_jointly == 1 and type(grid).levels is Grid.levels:
            return data_free(weight, grid, own, options, f"grid {grid.kind!r} has no list of levels to sweep over")
        grid = with_scale_dtype(grid, weight)
        factor = self.factor(grid.group_size)
        if factor.failure:
            return data_free(weight, grid, own, options, factor.failure)
        with torch.no_grad():
            state = self._begin(weight, grid, own, factor, options)
            state.rows = rows
            for piece in factor.pieces:
                if self.settings.order == "similarity":
                    self._sweep_by_similarity(state, piece)
                else:
                    self._sweep_piece(state, piece)
            loss, clipped, drift = counted(state)
            if not (math.isfinite(loss) and math.isfinite(drift)):
                return data_free(weight, grid, own, options, "the compensated weights ran away and are not finite")
            code = _encode(state, self.settings)
        share = clipped / max(1, weight.numel())
        return SweepResult(code, loss, factor.damping, factor.attempts, share, drift, False, factor.note)

    def _begin(self, weight: Tensor, grid: Grid, own: Statistics, factor: Factor, options: SolveOptions) -> SweepState:
        start = weight if weight.dtype == torch.float64 else weight.float()
        static = None
        order = factor.permutation
        if order is not None:
            start = start[:, order]
        elif self.settings.order == "similarity":
            order = torch.arange(weight.shape[1], device=weight.device)
            start = start.clone()  # both copies are put into order on the way
        start = start.masked_fill(factor.dead, 0) if bool(factor.dead.any()) else start
        if self.settings.target == "shift" and self.settings.needs_cross:
            start = self._shifted(start, factor)
        if self.settings.groups == "static" or (grid.columns_jointly > 1 and grid.group_size >= weight.shape[1]):
            vectors = grid.columns_jointly > 1
            plain = start if order is None or vectors else start[:, order.argsort()]
            static = grid.fit(plain.float(), ordered(own, order) if vectors else own)
        indices = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        return SweepState(
            start.clone(memory_format=torch.contiguous_format), start.contiguous(), grid, ordered(own, order), factor,
            order, self.settings.rule, static, options, indices, [], [], [],
        )  # fmt: skip

    def _shifted(self, weight: Tensor, factor: Factor) -> Tensor:
        """W (I + alpha D H_d^-1), columns in sweep order."""
        cross = self.statistics["cross"]
        order = factor.permutation
        shifted = weight.clone()
        for piece in factor.pieces:
            places = slice(piece.first, piece.last) if order is None else order[piece.first : piece.last]
            block = cross[places][:, places].to(weight.dtype).masked_fill(factor.dead[piece.first : piece.last], 0)
            upper = piece.upper.to(weight.dtype)
            step = ((weight[:, piece.first : piece.last] @ block) @ upper.T) @ upper
            shifted[:, piece.first : piece.last] += self.settings.alpha * step
        return shifted

    def _sweep_by_similarity(self, state: SweepState, piece: Piece) -> None:
        """Group by group: the most similar columns that remain come next, then are swept as a piece of their own."""
        assert state.order is not None
        remaining, size = Remaining(piece.upper), state.grid.group_size
        first = piece.first
        while first < piece.last:
            last = min(piece.last, (first // size + 1) * size)
            rest = slice(first, piece.last)
            places = with_first(most_similar(state.weight[:, rest], last - first), piece.last - first)
            state.weight[:, rest] = state.weight[:, rest][:, places]
            state.original[:, rest] = state.original[:, rest][:, places]
            state.order[rest] = state.order[rest][places]
            rows = remaining.take(places, last - first)
            self._sweep_columns(state, Piece(first, piece.last, rows, None, ()), last)
            first = last

    def _sweep_piece(self, state: SweepState, piece: Piece) -> None:
        self._sweep_columns(state, piece, piece.last)

    def _sweep_columns(self, state: SweepState, piece: Piece, stop: int) -> None:
        """Columns piece.first to stop - 1, whose errors go into all of the piece."""
        dtype = state.weight.dtype
        upper = piece.upper.to(dtype)
        feedback = None if piece.feedback is None else piece.feedback.to(dtype)
        for first, last, segments in blocks(piece.first, stop, state, self.settings.block_size):
            swept: list[SweptColumns] = []
            for a, b in segments:
                inside = slice(a - piece.first, b - piece.first)
                part = sweep_segment(
                    state, a, b, upper[inside, inside], None if feedback is None else feedback[inside, inside]
                )
                swept.append(part)
                if b < last:
                    rest = slice(b - piece.first, last - piece.first)
                    push(state.weight[:, b:last], part.errors, upper[inside, rest], 1)
                    if feedback is not None and part.residuals is not None:
                        push(state.weight[:, b:last], part.residuals, feedback[inside, rest], -1)
            if last < piece.last:
                push_tail(state, piece, range(first, last), swept, upper, feedback)


def sweep(
    weight: Tensor,
    statistics: Statistics,
    grid: Grid,
    settings: SweepSettings | None = None,
    options: SolveOptions | None = None,
) -> SweepResult:
    """`Sweeper(statistics, settings).run(weight, grid, options)`, for a single layer."""
    return Sweeper(statistics, settings or SweepSettings()).run(weight, grid, options)


def data_free(weight: Tensor, grid: Grid, statistics: Statistics, options: SolveOptions, reason: str) -> SweepResult:
    """What the grid gives without the moments of the input, and why."""
    own = {name: value for name, value in statistics.items() if name in ("fisher", "base")}
    code = grid.quantize(weight.to("cpu", torch.float32), in_main_memory(own))
    return SweepResult(code, 0.0, 0.0, (), 0.0, 0.0, True, f"{reason}; rounded without data")


def with_scale_dtype(grid: Grid, weight: Tensor) -> Grid:
    """The grid with scale_dtype "auto" decided for the whole matrix, not group by group."""
    if getattr(grid, "scale_dtype", None) != "auto" or not weight.numel():
        return grid
    dtype = scale_dtype_for("auto", float(weight.abs().amax()))
    return grid.model_copy(update={"scale_dtype": str(dtype).removeprefix("torch.")})


def _encode(state: SweepState, settings: SweepSettings) -> Code:
    """The code of what the sweep chose, in main memory, in the columns' own order where the form allows it."""
    grid = state.grid
    order = None if state.order is None else state.order.cpu()
    indices = state.indices.cpu()
    if order is not None and settings.order == "similarity" and bool((order.diff() == 1).all()):
        order = None
    shape = (state.weight.shape[0], state.weight.shape[1])
    fit = in_main_memory(state.static if state.static is not None else joined(state.fits))
    if grid.columns_jointly > 1:
        code = grid.join_vectors(in_main_memory(joined(state.parts)), fit, shape)
        return code if order is None else Permuted.encode(code, order)
    if order is None:
        return grid.encode(indices, fit)
    back = order.argsort()
    if state.static is not None:
        return grid.encode(indices[:, back].contiguous(), fit)
    if settings.order in WHOLE_GROUPS:  # groups are whole: their fits go back to their places
        size = grid.group_size
        places = (order[::size] // size).argsort()
        moved = {k: v[:, places].contiguous() for k, v in fit.items()}
        if "column_scales" in fit:  # these belong to columns, which moved inside their groups too
            scales = fit["column_scales"].reshape(-1).clone()
            scales[: len(back)] = scales[back]
            moved["column_scales"] = scales.view(fit["column_scales"].shape)
        return grid.encode(indices[:, back].contiguous(), moved)
    return Permuted.encode(grid.encode(indices, fit), order)
