"""Gathering statistics of one input, tokens after tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import known_statistics
from featherweight.methods.calibrate.statistics.base import Running, Tokens
from featherweight.model.network.observe import Seen


class Accumulator:
    """Statistics of one input. Sums are float32 of products in float32; means are kept, so values do not grow.

    guided : runs of output rows g for which tokens have weights of their own, 0 for none. Weights are [g, n] then;
        all statistics are weighted by their mean over g, `gram_of_rows` has a second moment for each of several, and
        held-out tokens are also counted alike, in `held_out_plain`
    """

    def __init__(self, in_features: int, needs: Collection[str], device: torch.device, guided: int = 0) -> None:
        known = {name: one for name, one in known_statistics().items() if one.gathered}
        wanted = {name: known[name] for name in known if name in needs or name == "tokens"}
        start = {name: one.start(in_features, device) for name, one in wanted.items()}
        self._seen: dict[str, Running] = {name: start[name] for name, one in wanted.items() if not one.held_out}
        self._held_out: dict[str, Running] = {name: start[name] for name, one in wanted.items() if one.held_out}
        self.tokens = 0
        self.weight = 0.0
        self.held_out_weight = 0.0
        known_grams = {"gram": known["gram"], "held_out_gram": known["held_out_gram"]}
        several = guided if guided > 1 and "gram" in needs else 0
        self._of_rows = [_Weighted(known_grams["gram"].start(in_features, device)) for _ in range(several)]
        plain = guided > 0 and "held_out_gram" in needs
        self._plain = _Weighted(known_grams["held_out_gram"].start(in_features, device)) if plain else None

    def add(self, inputs: Tensor, weights: Tensor | None = None, difference: Tensor | None = None) -> None:
        """Tokens [n, in], their weights [n], and how far the full-precision stream is from them, [n, in]."""
        if len(inputs) == 0:
            return
        self.tokens += len(inputs)
        for running in self._seen.values():
            running.see(inputs)
        if weights is not None and weights.dim() > 1:
            for run, own in zip(self._of_rows, weights, strict=False):
                run.add(inputs, own)
            weights = weights.mean(0)
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total <= 0:
            return
        self.weight += total
        _add(self._seen, inputs, weights, difference, total, self.weight)

    def add_held_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Tokens [n, in] of windows that no method sees."""
        if weights is not None and weights.dim() > 1:
            weights = weights.mean(0)
        if self._plain is not None:
            self._plain.add(inputs, None)
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
        if self._of_rows and all(run.weight > 0 for run in self._of_rows):
            found["gram_of_rows"] = torch.stack([run.running.finish().cpu() for run in self._of_rows])
        if self._plain is not None and self._plain.weight > 0:
            found["held_out_plain"] = self._plain.running.finish().cpu()
        self._seen, self._held_out, self._of_rows, self._plain = {}, {}, [], None
        return found


@dataclass
class _Weighted:
    """A statistic with the sum of the weights of what has entered it."""

    running: Running
    weight: float = 0.0

    def add(self, inputs: Tensor, weights: Tensor | None) -> None:
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total > 0:
            self.weight += total
            _add({"": self.running}, inputs, weights, None, total, self.weight)


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
