"""Equilibration: scales of input channels in closed form, from what channels carry and how large their columns are.

s_j = (E x_j^2)^a (|W_:j|^2)^-(1/2 - a), W diag(s) is rounded, and the input divided by s: a = 1/4 for rounding to
nearest, as in QuIP (arXiv 2307.13304, whose rescaling it is), 1/8 under error feedback (the `exponent`). No search, and
nothing but the diagonal of the input's second moment. Reconstructed: that the norm of a column counts squared is what
makes the result independent of the units of a channel, x_j -> c x_j with W_:j -> W_:j / c, for every a.

Layers that share an input share scales, |W_:j|^2 summed over them, and the norm or layer before takes up 1/s as AWQ's
(scale_search.py); where none can, and under grouped queries, 1/s is stored with the codes. With `shared: false` every
layer has scales of its own, all stored. Scales are divided by their geometric mean and kept within a factor of 10^4 of
it. A dead input counts as the weakest live one, a column of zeros keeps s = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid, LayerTransform, Scope, SolveOptions, Transform
from featherweight.methods.quantize.scale_search import fold, unit_of
from featherweight.methods.quantize.transforms.column_scale import ColumnScale
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register

SPREAD = 1e4  # scales are kept within this factor of their geometric mean


def equilibrating(power: Tensor, norms: Tensor, exponent: float) -> Tensor:
    """Scales float64 [in], positive and finite, with geometric mean 1 where both arguments are positive.

    power : E x_j^2 [in], finite
    norms : |W_:j|^2 [in], finite
    """
    power, norms = power.double(), norms.double()
    live = (power > 0) & (norms > 0)
    if not bool(live.any()):
        return torch.ones_like(power)
    power = torch.where(power > 0, power, power[power > 0].amin())
    logarithms = exponent * power.log() - (0.5 - exponent) * norms.log()
    scales = (logarithms - logarithms[live].mean()).exp().clamp(1 / SPREAD, SPREAD)
    return torch.where(norms > 0, scales, 1.0)


@register("transform", "equilibration")
class Equilibration(Transform):
    """Scales of input channels in closed form, taken up by what comes before where it can be (see the module)."""

    scope: ClassVar[Scope] = "block"
    exponent: float = Field(0.25, ge=0, le=0.5, description="a: 1/4 for rounding to nearest, 1/8 with error feedback")
    shared: bool = Field(True, description="one s for layers that share an input; else one for each, stored with it")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",)

    @property
    def alters(self) -> bool:
        return self.shared  # norms take up scales

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        return 0 if self.shared else 2 * shape[1]

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
        for group in session.groups:
            wanted = [name for name in group if name in set(names) and "gram" in statistics.get(name, {})]
            for part in [wanted] if self.shared and wanted else [[name] for name in wanted]:
                power = statistics[part[0]]["gram"].diagonal()
                if not bool(torch.isfinite(power).all()):
                    notify({"event": "scales", "layers": part, "skipped": "the inputs' second moment is not finite"})
                    continue
                norms = torch.stack([session.weight(name).double().square().sum(0) for name in part]).sum(0)
                scales = equilibrating(power, norms, self.exponent)
                if not (self.shared and _folded(session, part, scales)):
                    found |= {name: ColumnScale(scales) for name in part}
        return found


def _folded(session: BlockAccess, names: Sequence[str], scales: Tensor) -> bool:
    """Whether what comes before took up the division by the scales; the weights are multiplied by them then."""
    unit = unit_of(session, names)
    if not unit.absorbed or (unit.producer and session.layers[unit.producer].shape[0] != len(scales)):
        return False
    return fold(session, unit, scales) is not None
