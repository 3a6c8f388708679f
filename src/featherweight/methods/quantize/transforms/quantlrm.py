"""QuantLRM: AWQ's search with the importance of channels taken from what fine-tuning changed.

Quantization of Large Reasoning Models via Fine-Tuning Signals (arXiv 2602.02581), after the authors' code: the smallest
and the largest changes |W - W_base| mark important weights. A map of two parabolas takes the least positive change to
R, the median to 1 and the largest to R (R = 10); a channel's importance is the mean of the map over its rows times one
plus its number of exact zeros. Layers that share an input use the importance of the first (q_proj, gate_proj). Scales
are importance^alpha without AWQ's centring.

The extremes and the median are those of all compressed layers of all blocks, as published: the statistic `update_range`
[3], which is streamed from both checkpoints before the first block. `extremes: block` takes those of the block at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.scale_search import Unit
from featherweight.methods.quantize.transforms.awq import ScaleSearch
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register

BINS = 1 << 16


def update_range(updates: Callable[[], Iterable[Tensor]]) -> Tensor:
    """Least, exact median and largest of all positive entries: float32 [3]; NaN where there is none.

    updates : makes an iterator over parts of |W - W_base| of all layers, twice, so that not all are in memory at once.
    The median is the lower one of an even number. Positive floats are in the order of their bits: the first pass counts
    their upper halves, the second the lower halves of those that share the median's upper half.
    """
    least, largest = torch.tensor(torch.inf, device="cpu"), torch.tensor(0.0, device="cpu")
    upper = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for update in updates():
        values = _positive(update)
        if values.numel():
            least, largest = torch.minimum(least, values.amin()), torch.maximum(largest, values.amax())
            upper += torch.bincount((values.view(torch.int32) >> 16).long(), minlength=BINS)
    total = int(upper.sum())
    if total == 0:
        return torch.full((3,), torch.nan, device="cpu")
    rank = (total - 1) // 2
    high = _bin_of(rank, upper)
    lower = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for update in updates():
        bits = _positive(update).view(torch.int32)
        lower += torch.bincount((bits[bits >> 16 == high] & (BINS - 1)).long(), minlength=BINS)
    low = _bin_of(rank - int(upper[:high].sum()), lower)
    median = torch.tensor([high * BINS + low], dtype=torch.int32, device="cpu").view(torch.float32)[0]
    return torch.stack([least, median, largest])


def _bin_of(rank: int, counts: Tensor) -> int:
    """The bin in which the value of this rank, from 0, lies."""
    return int((counts.cumsum(0) > rank).to(torch.uint8).argmax())


def _positive(update: Tensor) -> Tensor:
    flat = update.float().flatten()
    return flat[flat > 0]


def two_parabolas(updates: Tensor, least: float, median: float, largest: float, ratio: float = 10.0) -> Tensor:
    """The map of step 2, elementwise: R at both ends, 1 at the median; zero changes give 1."""
    below = (median - updates) / max(median - least, 1e-30)
    above = (updates - median) / max(largest - median, 1e-30)
    bent = torch.where(updates <= median, below, above).clamp(-1, 1)
    return torch.where(updates == 0, torch.ones_like(updates), 1 + (ratio - 1) * bent.square())


def channel_importance(updates: Tensor, value_range: Tensor, ratio: float = 10.0) -> Tensor:
    """mean over rows of the map, times (1 + number of exact zeros in the column): float32 [in]."""
    updates = updates.float()
    zeros = (updates == 0).sum(0)
    if not bool(torch.isfinite(value_range).all()):  # no change anywhere
        return 1.0 + zeros.float()
    least, median, largest = (float(value) for value in value_range)
    return two_parabolas(updates, least, median, largest, ratio).mean(0) * (1 + zeros)


@register("transform", "quantlrm")
class QuantLrm(ScaleSearch):
    """Scales from the weights' changes during fine-tuning, and AWQ's clipping (see the module)."""

    centred: ClassVar[bool] = False
    ratio: float = Field(10.0, gt=1, description="importance of the least and the largest change, R")
    extremes: Literal["model", "block"] = Field(
        "model", description="least, median and largest change of the whole model, as published, or of each block"
    )
    times_activations: bool = Field(False, description="multiply by mean |x|, as published for one 70B model")

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, "base", *(("update_range",) if self.extremes == "model" else ()))

    def importance(self, session: BlockAccess, unit: Unit, statistics: Mapping[str, Statistics]) -> Tensor | None:
        first = unit.names[0]
        if "base" not in statistics[first]:
            raise RecipeError(
                f"transform quantlrm needs the weight of {first} in the model that this one was fine-tuned from: name "
                "that model with base_model= (on the command line --base-model)"
            )
        if self.extremes == "block":
            value_range = update_range(lambda: self._updates(session, statistics))
        elif "update_range" in statistics[first]:
            value_range = statistics[first]["update_range"]
        else:
            raise RecipeError("transform quantlrm needs the range of changes in the whole model: set extremes to block")
        update = (session.weight(first) - statistics[first]["base"]).abs()
        found = channel_importance(update, value_range, self.ratio)
        return found * statistics[first]["mean_abs"].float() if self.times_activations else found

    def _updates(self, session: BlockAccess, statistics: Mapping[str, Statistics]) -> Iterable[Tensor]:
        return ((session.weight(n) - s["base"]).abs() for n, s in statistics.items() if "base" in s)
