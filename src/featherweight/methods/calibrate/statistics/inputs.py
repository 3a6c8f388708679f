"""What is known of the inputs themselves.

mean       [in]      sum w x / sum w
mean_abs   [in]      sum w |x| / sum w
mean_square [in]     sum w x^2 / sum w
inputs     [t, in]   x of at most 512 tokens, evenly strided
tokens     []        int64, number of tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics.base import Basis, Running, Statistic, Statistics, Tokens
from featherweight.registry import register

SAMPLE = 512


class _RunningMean(Running):
    def __init__(self, in_features: int, device: torch.device, absolute: bool) -> None:
        self.mean = torch.zeros(in_features, device=device)
        self.absolute = absolute

    def add(self, tokens: Tokens) -> None:
        values = tokens.weighted.abs() if self.absolute else tokens.weighted
        self.mean.mul_(tokens.old).add_(values.sum(0), alpha=tokens.new)

    def finish(self) -> Tensor:
        return self.mean


class _RunningSquares(Running):
    def __init__(self, in_features: int, device: torch.device) -> None:
        self.mean = torch.zeros(in_features, device=device)

    def add(self, tokens: Tokens) -> None:
        self.mean.mul_(tokens.old).add_((tokens.weighted * tokens.inputs).sum(0), alpha=tokens.new)

    def finish(self) -> Tensor:
        return self.mean


class _RunningSample(Running):
    """At most SAMPLE rows at even distances from a stream of unknown length."""

    weighs = False

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.stride, self.count = 1, 0
        self.rows: list[Tensor] = [torch.zeros(0, in_features, device=device)]
        self.held = 0

    def see(self, inputs: Tensor) -> None:
        first = -self.count % self.stride
        self.count += len(inputs)
        taken = inputs[first :: self.stride].to(torch.float32, copy=True)
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


class _RunningCount(Running):
    weighs = False

    def __init__(self) -> None:
        self.tokens = 0

    def see(self, inputs: Tensor) -> None:
        self.tokens += len(inputs)

    def finish(self) -> Tensor:
        return torch.tensor(self.tokens, dtype=torch.int64, device="cpu")


@register("statistic", "mean")
class Mean(Statistic):
    axes = ("in",)

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningMean(in_features, device, absolute=False)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return basis.inputs(value)


@register("statistic", "mean_abs")
class MeanAbs(Statistic):
    """In another basis the mean |T x| of the sampled inputs stands in for it, unless the transform knows better."""

    axes = ("in",)

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningMean(in_features, device, absolute=True)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        known = super().carry(value, basis, statistics)
        if known is None and "inputs" in statistics:
            return basis.inputs(statistics["inputs"]).abs().mean(0)
        return known


@register("statistic", "mean_square")
class MeanSquare(Statistic):
    """The diagonal of `gram`. In another basis that of `gram` there, or of the sampled inputs."""

    axes = ("in",)

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningSquares(in_features, device)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        known = super().carry(value, basis, statistics)
        if known is None and "gram" in statistics:
            return basis.inputs(basis.inputs(statistics["gram"]).mT.contiguous()).diagonal().clone()
        if known is None and "inputs" in statistics:
            return basis.inputs(statistics["inputs"]).square().mean(0)
        return known


@register("statistic", "inputs")
class Inputs(Statistic):
    axes = ("tokens", "in")

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningSample(in_features, device)

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return basis.inputs(value)


@register("statistic", "tokens")
class TokenCount(Statistic):
    axes = ()

    def start(self, in_features: int, device: torch.device) -> Running:
        return _RunningCount()

    def carry(self, value: Tensor, basis: Basis, statistics: Statistics) -> Tensor | None:
        return value
