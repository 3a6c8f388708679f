"""The steps of a sweep: blocks of columns, segments, groups and vectors; see `featherweight.methods.quantize.sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, of_columns, restricted
from featherweight.methods.quantize.base import Fit, Grid, SolveOptions
from featherweight.methods.quantize.sweep_factor import Factor, Piece
from featherweight.methods.quantize.sweep_rows import RowFeedback
from featherweight.native.sweep import Columns, FeedbackRule, SweptColumns, sweep_columns, totals_of


@dataclass
class SweepState:
    """How far a sweep is; columns in sweep order."""

    weight: Tensor  # working copy
    original: Tensor
    grid: Grid
    statistics: Statistics
    factor: Factor
    order: Tensor | None  # column of the matrix at each place; grows on the way where columns go by similarity
    rule: FeedbackRule
    static: Fit | None
    options: SolveOptions
    indices: Tensor  # uint8 [out, in]
    fits: list[Fit]
    parts: list[Fit]
    totals: list[Tensor]  # of every segment, see `SweptColumns.totals`; left on the device until the end
    rows: RowFeedback | None = None


def ordered(statistics: Statistics, order: Tensor | None) -> Statistics:
    return statistics if order is None else _Ordered(statistics, order)


class _Ordered(dict[str, Tensor]):
    """Statistics in sweep order, made window by window: nothing of the size of H is copied."""

    def __init__(self, statistics: Statistics, order: Tensor) -> None:
        super().__init__(statistics)
        self.order = order

    def window(self, first: int, last: int) -> dict[str, Tensor]:
        return of_columns(self, self.order[first:last])


def _statistics_of(state: SweepState, first: int, last: int) -> dict[str, Tensor]:
    if isinstance(state.statistics, _Ordered):
        return state.statistics.window(first, last)
    return restricted(state.statistics, first, last)


def blocks(
    first: int, stop: int, state: SweepState, block_size: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Blocks of columns first to stop - 1 of a piece, each with its segments.

    No group of a dynamic grid begins or ends inside a segment. A group that begins inside a block and goes on behind it
    would be fitted to columns that are not up to date: the block then ends before it.
    """
    size, jointly = state.grid.group_size, state.grid.columns_jointly
    if jointly > 1 and first % jointly:
        raise ValueError(f"pieces of {first} columns do not hold whole vectors of {jointly}; change factor_columns")
    dynamic = state.static is None
    step = -(-block_size // jointly) * jointly
    while first < stop:
        last = min(stop, first + step)
        whole = last // size * size
        if dynamic and last < stop and first < whole < last:
            last = whole
        begins = range(-(-first // size) * size, last, size) if dynamic else range(0)
        edges = sorted({first, last, *begins})
        segments = list(zip(edges, edges[1:], strict=False))
        if state.rule.pull_back == "all-columns":  # the decay goes over whatever is behind: one segment a block
            for segment in segments:
                yield *segment, [segment]
        else:
            yield first, last, segments
        first = last


def sweep_segment(state: SweepState, first: int, last: int, upper: Tensor, feedback: Tensor | None) -> SweptColumns:
    """Round columns first to last - 1 of the working copy, fitting the grid if a group begins here."""
    if state.static is None and first % state.grid.group_size == 0:
        _fit_group(state, first)
    if state.grid.columns_jointly > 1:
        swept = _sweep_vectors(state, first, last, upper, feedback)
    else:
        levels, group_of = _levels(state, first, last)
        options = state.options
        weight, original = state.weight[:, first:last], state.original[:, first:last]
        columns = Columns(weight, original, upper, feedback, levels, group_of, state.rule)
        if state.rows is not None:
            swept = state.rows.sweep(columns, options)
        else:
            swept = sweep_columns(columns, options.threads, "auto" if options.backend == "native" else options.backend)
        state.indices[:, first:last] = swept.indices
    state.totals.append(swept.totals)
    return swept


def counted(state: SweepState) -> tuple[float, int, float]:
    """Loss, clipped weights and drift of all segments."""
    if not state.totals:
        return 0.0, 0, 0.0
    totals = torch.stack(state.totals).cpu()
    return sum(totals[:, 0].tolist()), int(totals[:, 1].sum()), float(totals[:, 2].amax())


def _fit_group(state: SweepState, first: int) -> None:
    last = min(state.weight.shape[1], first + state.grid.group_size)
    window = state.weight[:, first:last].float().contiguous()
    if state.rule.pull_back == "next-column":  # its first column is pulled back before it is rounded
        start = state.weight[:, first]
        pulled = start - state.rule.shrink * (start - state.original[:, first])
        window = torch.cat([pulled.float().unsqueeze(1), window[:, 1:]], 1)
    state.fits.append(state.grid.fit(window, _statistics_of(state, first, last)))


def _levels(state: SweepState, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Levels [out, groups, L] of the groups that columns first to last - 1 belong to, and the place of each column's.

    With a grid that scales columns, every column has levels of its own.
    """
    levels, place = _group_levels(state, first, last)
    fit = state.fits[-1] if state.static is None else state.static
    scales = state.grid.column_scales(fit)
    if scales is None:
        return levels, place
    if state.static is None:
        columns = _places(state, first, last) - first // state.grid.group_size * state.grid.group_size
    else:
        columns = _places(state, first, last) if state.order is None else state.order[first:last]
    own = levels[:, place.long()] * scales[columns].unsqueeze(-1)
    return own, _places(state, 0, last - first).to(torch.int32)


def _places(state: SweepState, first: int, last: int) -> Tensor:
    """first to last - 1: int64, where the weight is."""
    return torch.arange(first, last, device=state.weight.device)


def _group_levels(state: SweepState, first: int, last: int) -> tuple[Tensor, Tensor]:
    if state.static is None:
        return state.grid.levels(state.fits[-1]), torch.zeros_like(_places(state, first, last), dtype=torch.int32)
    columns = _places(state, first, last)
    if state.order is not None:
        columns = state.order[first:last]
    of = columns // state.grid.group_size
    groups = torch.unique(of)
    place = torch.searchsorted(groups, of).to(torch.int32)
    return state.grid.levels({name: value[:, groups] for name, value in state.static.items()}), place


def _sweep_vectors(state: SweepState, first: int, last: int, upper: Tensor, feedback: Tensor | None) -> SweptColumns:
    """Several columns at a time: E = (V - V^) U_JJ^-1. The rule's terms are those of single columns."""
    rule, size = state.rule, state.grid.columns_jointly
    weight, original = state.weight[:, first:last], state.original[:, first:last]
    passed: dict[str, list[Tensor]] = {"errors": [], "residuals": [], "tail_errors": [], "tail_residuals": []}
    loss, drift = (torch.zeros(len(weight), dtype=torch.float64, device=weight.device) for _ in range(2))
    for a in range(0, last - first, size):
        b = min(last - first, a + size)
        v, v0 = weight[:, a:b], original[:, a:b]
        if rule.pull_back == "next-column":
            v -= rule.shrink * (v - v0)
        rounded = _round_vector(state, v, first + a)
        triangle = upper[a:b, a:b]
        instead = rounded if rule.tail == "rounded" else v  # a vector grid has no range to clamp to
        for name, kept in (("errors", v), ("tail_errors", instead)):
            missed = (v - rounded) + rule.residual * (v0 - kept) + rule.shrink * (v0 - v)
            passed[name].append(torch.linalg.solve_triangular(triangle, missed, upper=True, left=False))
        for name, kept in (("residuals", v), ("tail_residuals", instead)):
            passed[name].append(rule.alpha * kept + rule.residual * (v0 - kept))
        plain = torch.linalg.solve_triangular(triangle, v - rounded, upper=True, left=False)
        loss += plain.double().square().sum(1)
        drift = torch.maximum(drift, (v - v0).abs().amax(1).double())
        after, pulled = weight[:, b:], None
        if rule.pull_back == "all-columns":
            pulled = rule.shrink * (after - original[:, b:])
        push(after, passed["errors"][-1], upper[a:b, b:], 1)
        if feedback is not None:
            push(after, passed["residuals"][-1], feedback[a:b, b:], -1)
        if pulled is not None:
            after -= pulled
    whole = {name: torch.cat(parts, 1) for name, parts in passed.items()}
    fed = feedback is not None
    return SweptColumns(
        state.indices[:, first:last],
        whole["errors"],
        whole["residuals"] if fed else None,
        whole["tail_errors"],
        whole["tail_residuals"] if fed else None,
        totals_of(loss, torch.zeros_like(loss), drift),
    )


def _round_vector(state: SweepState, vectors: Tensor, first: int) -> Tensor:
    """Values of the vectors in columns from `first` on; their code parts are kept."""
    size, width = state.grid.columns_jointly, vectors.shape[1]
    padded = torch.nn.functional.pad(vectors.float(), (0, size - width))
    if state.static is not None:
        fit, place = state.static, first
    else:
        fit, place = state.fits[-1], first - first // state.grid.group_size * state.grid.group_size
    values, part = state.grid.round_vectors(padded, place, fit, _statistics_of(state, first, first + width))
    state.parts.append(part)
    return values[:, :width].to(vectors.dtype)


def push_tail(
    state: SweepState, piece: Piece, block: range, swept: list[SweptColumns], upper: Tensor, feedback: Tensor | None
) -> None:
    """Hand what a block's columns pass on to all columns behind the block."""
    first, last = block.start, block.stop
    behind = state.weight[:, last : piece.last]
    inside, rest = slice(first - piece.first, last - piece.first), slice(last - piece.first, None)
    errors = torch.cat([part.tail_errors for part in swept], 1) if len(swept) > 1 else swept[0].tail_errors
    kept = [part.tail_residuals for part in swept if part.tail_residuals is not None]
    residuals = torch.cat(kept, 1) if kept else None
    if state.rule.pull_back == "all-columns":  # every column of the block decays what came before it
        decay, jointly = 1 - state.rule.shrink, state.grid.columns_jointly
        steps = -(-(last - first) // jointly)
        powers = [decay ** (steps - 1 - j // jointly) for j in range(last - first)]
        weights = torch.tensor(powers, dtype=errors.dtype, device=errors.device)
        original = state.original[:, last : piece.last]
        behind.sub_(original).mul_(decay**steps).add_(original)
        errors = errors * weights
        residuals = None if residuals is None else residuals * weights
    push(behind, errors, upper[inside, rest], 1)
    if feedback is not None and residuals is not None:
        push(behind, residuals, feedback[inside, rest], -1)


def push(target: Tensor, passed: Tensor, through: Tensor, sign: int) -> None:
    """target -= sign * passed @ through, in place."""
    target.addmm_(passed, through, alpha=-sign)


def joined(fits: list[Fit]) -> Fit:
    """The fit of neighbouring windows together."""
    return {name: torch.cat([fit[name] for fit in fits], 1) for name in fits[0]}
