"""AWQ: per-input-channel scales found by search, folded into what comes before; and a search for clipping bounds.

Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978) and its authors' code:
s = a^alpha with a = mean |x| of the channel, alpha of 20 points from 0, divided by sqrt(max s min s); the loss is the
mean squared difference of the attention's output (q, k, v), the MLP's (gate, up) or the layer's own (o, down).

Where this departs: the quantiser inside the search is the recipe's grid, whose uniform form keeps zero inside the range
(the published one may clip a group without a change of sign); the search sees `search_tokens` tokens; fewer tokens than
the clip search wants are used as they are. What nothing can absorb is either left alone, as published for grouped
queries, or stored as column scales of the code.

The clip search is of the published per-group form. It returns bounds, not weights: what is rounded is the clamped
weight, while the block keeps computing with the unclamped one until its code takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import Statistics, unchanged
from featherweight.methods.quantize.base import Grid, LayerTransform, Scope, SolveOptions, Transform
from featherweight.methods.quantize.scale_search import (
    Loss,
    Unit,
    averaged,
    clamped,
    clip_bounds,
    fold,
    layer_loss,
    module_loss,
    search,
    unit_of,
)
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.codes import Code

UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")  # parts of names the published code does not clip


@dataclass(frozen=True)
class Clipped:
    """Clamp to bounds before rounding, after another transform. Clamping has no inverse: `invert` is the other's."""

    bounds: Tensor  # [out, groups], in the other's basis
    group_size: int
    inner: LayerTransform | None = None

    @property
    def portable(self) -> bool:
        return self.inner is None or bool(getattr(self.inner, "portable", False))

    def apply(self, weight: Tensor) -> Tensor:
        bounds = self.bounds.to(weight.device)
        return clamped(self.inner.apply(weight) if self.inner else weight, bounds, self.group_size)

    def invert(self, weight: Tensor) -> Tensor:
        return self.inner.invert(weight) if self.inner else weight

    def inputs(self, inputs: Tensor) -> Tensor:
        return self.inner.inputs(inputs) if self.inner else inputs

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        return self.inner.statistics(statistics) if self.inner else unchanged(statistics)

    def wrap(self, code: Code) -> Code:
        return self.inner.wrap(code) if self.inner else code


class ScaleSearch(Transform):
    """What AWQ and its relatives share; they differ in `importance` and in whether scales are centred."""

    scope: ClassVar[Scope] = "block"
    centred: ClassVar[bool] = True

    points: int = Field(20, ge=1, description="alpha = 0, 1/points, ..., below 1")
    grouped_queries: Literal["skip", "average", "store"] = Field(
        "skip", description="o_proj where v_proj has fewer channels: no scales, equal ones per group, or stored ones"
    )
    unabsorbed: Literal["skip", "store"] = Field(
        "store", description="layers before which nothing can absorb the scales: no scales, or stored column scales"
    )
    search_tokens: int | None = Field(16384, ge=1, description="tokens that modules are run on in a trial; null: all")
    clip: bool = Field(True, description="search for a bound of each group and clamp to it before rounding")
    clip_steps: int = Field(20, ge=1, description="bounds are 1, 1 - 1/steps, ... times the largest weight of a group")
    clip_shrink: float = Field(0.5, gt=0, le=1, description="how far bounds go down")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram", "mean_abs", "inputs") if self.clip else ("gram", "mean_abs")

    @property
    def alters(self) -> bool:
        return True  # norms take up scales

    def importance(self, session: BlockAccess, unit: Unit, statistics: Mapping[str, Statistics]) -> Tensor | None:
        """How much each input channel of the unit matters: [in], not negative; None where nothing is known."""
        raise TypeError(f"transform {self.kind!r} does not say how much a channel matters")

    def transform_block(
        self,
        session: BlockAccess,
        names: Sequence[str],
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        options: SolveOptions,
        notify: Observer = silent,
    ) -> dict[str, LayerTransform]:
        found: dict[str, LayerTransform] = {}
        divided: dict[str, Tensor] = {}
        wanted = [[name for name in group if name in set(names)] for group in session.groups]
        units = [unit_of(session, part) for part in wanted if part and "gram" in statistics.get(part[0], {})]
        importances = [self.importance(session, unit, statistics) for unit in units]  # before any weight changes
        for unit, importance in zip(units, importances, strict=True):
            scales, stored = self._scales(session, unit, importance, grids, statistics, notify)
            if scales is None:
                continue
            divided |= dict.fromkeys(unit.names, scales)
            if stored:
                found |= {name: ColumnScale(scales) for name in unit.names}
        if self.clip:
            for name in names:
                if "inputs" in statistics.get(name, {}) and not any(
                    part in name.rpartition(".")[2] for part in UNCLIPPED
                ):
                    found[name] = self._clipped(session, name, grids[name], statistics[name], divided, found.get(name))
        return found

    def _scales(
        self,
        session: BlockAccess,
        unit: Unit,
        importance: Tensor | None,
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        notify: Observer,
    ) -> tuple[Tensor | None, bool]:
        """The unit's scales, None where there are none; and whether they must be stored. Folds the others."""
        first = unit.names[0]
        columns = session.layers[first].shape[1]
        rows = session.layers[unit.producer].shape[0] if unit.producer else columns
        stored = not unit.absorbed
        head_dim = None
        if unit.producer and rows != columns:
            stored = self.grouped_queries == "store"
            head_dim = _head_dim(session, rows, columns) if self.grouped_queries == "average" else None
            if not stored and head_dim is None:
                notify({"event": "scales", "layers": list(unit.names), "skipped": "grouped queries"})
                return None, False
        elif stored and self.unabsorbed == "skip":
            return None, False
        if importance is None:
            notify({"event": "scales", "layers": list(unit.names), "skipped": "no importance of channels is known"})
            return None, False
        weights = {name: session.weight(name) for name in unit.names}
        tie = (lambda s: averaged(s, rows, columns // rows, head_dim)) if head_dim else (lambda s: s)
        best = search(weights, grids, importance, self._loss(session, unit, weights, statistics), self.points,
                      self.centred, tie=tie)  # fmt: skip
        notify(
            {"event": "scales", "layers": list(unit.names), "alpha": best.alpha, "loss": best.loss, "rtn": best.start}
        )
        if best.alpha is None:
            return None, False
        if stored:
            return best.scales, True
        folded = fold(session, unit, best.scales, head_dim)
        if folded is not None:
            return folded.float(), False
        notify({"event": "scales", "layers": list(unit.names), "stored": "folding would change the block's function"})
        return (best.scales, True) if self.unabsorbed == "store" else (None, False)

    def _loss(
        self, session: BlockAccess, unit: Unit, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]
    ) -> Loss:
        """A group of one is inspected by itself, a group of several by the module around it."""
        if len(unit.names) == 1:
            return layer_loss(weights, statistics[unit.names[0]]["gram"].float())
        return module_loss(session, unit.names, self.search_tokens)

    def _clipped(
        self,
        session: BlockAccess,
        name: str,
        grid: Grid,
        statistics: Statistics,
        divided: Mapping[str, Tensor],
        stored: LayerTransform | None,
    ) -> Clipped:
        weight, inputs = session.weight(name), statistics["inputs"].float()
        if stored is not None:
            weight, inputs = stored.apply(weight), stored.inputs(inputs)
        elif name in divided:
            inputs = inputs / divided[name]
        bounds = clip_bounds(weight, inputs, grid, self.clip_steps, self.clip_shrink)
        return Clipped(bounds, min(grid.group_size, weight.shape[1]), stored)


def _head_dim(session: BlockAccess, rows: int, columns: int) -> int | None:
    """Channels of a head, from the attention module; None if it does not say."""
    found = {getattr(module, "head_dim", None) for module in session.module.modules()} - {None}
    head_dim = next(iter(found)) if len(found) == 1 else None
    return head_dim if isinstance(head_dim, int) and rows % head_dim == 0 and columns % rows == 0 else None


@register("transform", "awq")
class Awq(ScaleSearch):
    """Scales from mean |x|, and clipping (see the module)."""

    def importance(self, session: BlockAccess, unit: Unit, statistics: Mapping[str, Statistics]) -> Tensor | None:
        found = statistics[unit.names[0]].get("mean_abs")
        if found is None:
            raise RecipeError("transform awq needs the statistic mean_abs, which was not gathered")
        return found.float() if torch.isfinite(found).all() else None
