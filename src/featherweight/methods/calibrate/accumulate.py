"""Gathering statistics of one input, tokens after tokens."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import known_statistics
from featherweight.methods.calibrate.statistics.base import Running, Tokens
from featherweight.model.network.observe import Seen


class Accumulator:
    """Statistics of one input. Sums are float32 of products in float32; means are kept, so values do not grow."""

    def __init__(self, in_features: int, needs: Collection[str], device: torch.device) -> None:
        known = {name: one for name, one in known_statistics().items() if one.gathered}
        wanted = {name: known[name] for name in known if name in needs or name == "tokens"}
        start = {name: one.start(in_features, device) for name, one in wanted.items()}
        self._seen: dict[str, Running] = {name: start[name] for name, one in wanted.items() if not one.held_out}
        self._held_out: dict[str, Running] = {name: start[name] for name, one in wanted.items() if one.held_out}
        self.tokens = 0
        self.weight = 0.0
        self.held_out_weight = 0.0

    def add(self, inputs: Tensor, weights: Tensor | None = None, difference: Tensor | None = None) -> None:
        """Tokens [n, in], their weights [n], and how far the full-precision stream is from them, [n, in]."""
        if len(inputs) == 0:
            return
        self.tokens += len(inputs)
        for running in self._seen.values():
            running.see(inputs)
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total <= 0:
            return
        self.weight += total
        _add(self._seen, inputs, weights, difference, total, self.weight)

    def add_held_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Tokens [n, in] of windows that no method sees."""
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total <= 0:
            return
        self.held_out_weight += total
        _add(self._held_out, inputs, weights, None, total, self.held_out_weight)

    def finish(self) -> dict[str, Tensor]:
        """The statistics, in main memory; those that no token reached are left out, but for `tokens`."""
        kept = {"tokens": self._seen["tokens"]}
        kept |= {name: one for name, one in self._seen.items() if (self.weight > 0 if one.weighs else self.tokens > 0)}
        if self.held_out_weight > 0:
            kept |= self._held_out
        found = {name: running.finish().cpu() for name, running in kept.items()}
        self._seen, self._held_out = {}, {}
        return found


def _add(
    to: dict[str, Running],
    inputs: Tensor,
    weights: Tensor | None,
    difference: Tensor | None,
    total: float,
    of_all: float,
) -> None:
    tokens = Tokens(inputs, weights, difference, 1 - total / of_all, 1 / of_all)
    for running in to.values():
        running.add(tokens)


def difference_of(one: Seen, partner: Seen, batch_tokens: int) -> Tensor | None:
    """Full-precision input minus present input, row by row; zero for tokens that went elsewhere in the other stream."""
    if one.tokens is None or partner.tokens is None:
        return partner.rows - one.rows if partner.rows.shape == one.rows.shape else None
    place = torch.full((batch_tokens,), -1, dtype=torch.long, device=one.rows.device)
    place[partner.tokens] = torch.arange(len(partner.rows), device=one.rows.device)
    at = place[one.tokens]
    paired = at >= 0
    difference = torch.zeros_like(one.rows, dtype=torch.float32)  # of values close together: not rounded again
    difference[paired] = partner.rows[at[paired]].float() - one.rows[paired].float()
    return difference
