"""Running means over the tokens that enter a layer; see `featherweight.calibrate.statistics` for what each is.

GPTQ (arXiv 2210.17323) sums (2 / N) x x'; here the factor 2 is left out. GPTAQ (arXiv 2504.02692) adds the cross
moment.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

SAMPLE = 512


class Accumulator:
    """Statistics of one input. Sums are float32 of products in float32; means are kept, so values do not grow."""

    def __init__(self, in_features: int, needs: Collection[str], device: torch.device) -> None:
        self.in_features, self.needs = in_features, frozenset(needs)
        self.tokens = 0
        self.weight = 0.0
        self.held_out_weight = 0.0
        self._means: dict[str, Tensor] = {}
        for name in ("gram", "cross", "held_out_gram"):
            if name in self.needs:
                self._means[name] = torch.zeros(in_features, in_features, device=device)
        for name in ("mean", "mean_abs"):
            if name in self.needs:
                self._means[name] = torch.zeros(in_features, device=device)
        self._sample = _StridedSample() if "inputs" in self.needs else None

    def add(self, inputs: Tensor, weights: Tensor | None = None, difference: Tensor | None = None) -> None:
        """Tokens [n, in], their weights [n], and how far the full-precision stream is from them, [n, in]."""
        if len(inputs) == 0:
            return
        inputs = inputs.float()
        self.tokens += len(inputs)
        if self._sample is not None:
            self._sample.add(inputs)
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total <= 0:
            return
        self.weight += total
        old, new = 1 - total / self.weight, 1 / self.weight
        weighted = inputs if weights is None else inputs * weights[:, None]
        if "gram" in self._means:
            self._add_gram("gram", inputs, weights, old, new)
        if "cross" in self._means and difference is not None:
            self._means["cross"].addmm_(difference.float().t(), weighted, beta=old, alpha=new)
        elif "cross" in self._means:
            self._means["cross"].mul_(old)
        if "mean" in self._means:
            self._means["mean"].mul_(old).add_(weighted.sum(0), alpha=new)
        if "mean_abs" in self._means:
            self._means["mean_abs"].mul_(old).add_(weighted.abs().sum(0), alpha=new)

    def add_held_out(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Tokens [n, in] of windows that no method sees."""
        total = float(len(inputs)) if weights is None else float(weights.double().sum())
        if total <= 0:
            return
        self.held_out_weight += total
        old, new = 1 - total / self.held_out_weight, 1 / self.held_out_weight
        self._add_gram("held_out_gram", inputs.float(), weights, old, new)

    def _add_gram(self, name: str, inputs: Tensor, weights: Tensor | None, old: float, new: float) -> None:
        scaled = inputs if weights is None else inputs * weights.sqrt()[:, None]
        self._means[name].addmm_(scaled.t(), scaled, beta=old, alpha=new)

    def finish(self) -> dict[str, Tensor]:
        """The statistics, in main memory; those that no token reached are left out, but for `tokens`."""
        found: dict[str, Tensor] = {"tokens": torch.tensor(self.tokens, dtype=torch.int64)}
        for name, value in self._means.items():
            if (self.held_out_weight if name == "held_out_gram" else self.weight) > 0:
                found[name] = (symmetrised(value) if "gram" in name else value).cpu()
        if self._sample is not None and self.tokens:
            found["inputs"] = self._sample.finish().cpu()
        self._means = {}
        return found


def symmetrised(matrix: Tensor, block: int = 1024) -> Tensor:
    """(M + M') / 2 in place, with a temporary of one block of rows."""
    size = len(matrix)
    for i in range(0, size, block):
        for j in range(i, size, block):
            upper, lower = matrix[i : i + block, j : j + block], matrix[j : j + block, i : i + block]
            middle = (upper + lower.t()) / 2
            upper.copy_(middle)
            lower.copy_(middle.t())
    return matrix


class _StridedSample:
    """At most SAMPLE rows at even distances from a stream of unknown length."""

    def __init__(self) -> None:
        self.stride, self.count = 1, 0
        self.rows: list[Tensor] = []
        self.held = 0

    def add(self, rows: Tensor) -> None:
        first = -self.count % self.stride
        self.count += len(rows)
        taken = rows[first :: self.stride].clone()
        self.rows.append(taken)
        self.held += len(taken)
        while self.held >= 2 * SAMPLE:
            self.rows = [torch.cat(self.rows)[::2].clone()]
            self.held = len(self.rows[0])
            self.stride *= 2

    def finish(self) -> Tensor:
        rows = torch.cat(self.rows)
        if len(rows) <= SAMPLE:
            return rows
        return rows[torch.arange(SAMPLE, device=rows.device) * len(rows) // SAMPLE].clone()
