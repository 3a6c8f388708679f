"""Rate and distortion by dynamic programming: the exact answer to the question that `mixed-precision` answers by steps.

    minimise  sum_l n_l e_l(c_l)   subject to   sum_l bytes_l(c_l) <= bits / 8 * sum_l n_l

RD-Pruning (arXiv 2308.10438) shares out survivors of pruning so; here options are grids and the rate is bytes. Curves
need not be convex: candidates off the lower hull are taken where they serve best. The programme is that of `knapsack`:
bytes are counted in cells, rounded up where a cell is wider than what all candidates have in common, so that the budget
is never exceeded.
"""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.methods.budget.base import LayerCandidates
from featherweight.methods.budget.knapsack import Option, solve_exactly
from featherweight.methods.budget.mixed_precision import MixedPrecision, error_of
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register


@register("allocation", "rate-distortion")
class RateDistortion(MixedPrecision):
    """Of several grids, to each layer one by the dynamic programme over bytes (see the module)."""

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        if not layers:
            return {}
        items = [[Option(c.nbytes, x.weights * error_of(c)) for c in x.candidates] for x in layers.values()]
        found = solve_exactly(items, self.budget(layers))
        return {
            name: x.candidates[place].treatment for (name, x), place in zip(layers.items(), found.chosen, strict=True)
        }
