"""Problems, grids and a plain form of the published updates that the tests of the sweep share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, SolveOptions
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.sweep import SweepResult, SweepSettings, sweep
from featherweight.native import library
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense

EXACT = SolveOptions(backend="reference")
NATIVE = library.get()
needs_native = pytest.mark.skipif(NATIVE is None, reason="the native library is not built")
ORDERS = [
    {"order": order, "groups": groups}
    for order, groups in product(("none", "activation", "group-aware", "group-sum"), ("dynamic", "static"))
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.25},
    {"alpha": 0.25, "residual_compensation": 0.25},
    {"shrink": 0.2},
    {"shrink": 0.2, "pull_back": "none"},
    {"shrink": 0.2, "pull_back": "all-columns"},
    {"shrink": 0.1, "alpha": 0.25, "pull_back": "all-columns"},
    {"alpha": 0.5, "target": "shift"},
    {"order": "activation"},
    {"order": "group-aware", "alpha": 0.25},
    {"order": "similarity"},
    {"order": "similarity", "shrink": 0.2, "pull_back": "all-columns"},
]


@dataclass(frozen=True)
class Problem:
    """A weight, the inputs seen, and what the original network would have put there; float64."""

    weight: Tensor
    inputs: Tensor  # [n, k]
    original_inputs: Tensor

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        x, lost = self.inputs, self.original_inputs - self.inputs
        return {"gram": x @ x.T / x.shape[1], "cross": lost @ x.T / x.shape[1]}

    def damped(self, damping: float = 0.01) -> Tensor:
        return damp(self.statistics["gram"], damping)

    def asymmetric(self, code: Code) -> float:
        """||Q X - W X~||^2, a token."""
        missed = code.decode().double() @ self.inputs - self.weight @ self.original_inputs
        return float(missed.square().sum() / self.inputs.shape[1])


def damp(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)


@lru_cache(maxsize=16)
def problem(seed: int = 0, rows: int = 24, n: int = 64, samples: int = 4096, lost: float = 0.3) -> Problem:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 + 0.7 * torch.eye(n, dtype=torch.float64)
    weight = torch.randn(rows, n, generator=g, dtype=torch.float64)
    change = torch.randn(n, n, generator=g, dtype=torch.float64) * lost / n**0.5
    original = a @ torch.randn(n, samples, generator=g, dtype=torch.float64)
    noise = 0.05 * torch.randn(n, samples, generator=g, dtype=torch.float64)
    return Problem(weight, original + change @ original + noise, original)


def grid(bits: int = 3, group_size: int = 64, **changes: Any) -> UniformGrid:
    return UniformGrid(bits=bits, group_size=group_size, scale_dtype=changes.pop("scale_dtype", "float32"), **changes)


def missed(weight: Tensor, code: Code, gram: Tensor) -> float:
    """tr((W - Q) H (W - Q)')."""
    error = weight.double() - code.decode().double()
    return float(((error @ gram.double()) * error).sum())


def run(given: Problem, on: Grid | None = None, options: SolveOptions = EXACT, **changes: Any) -> SweepResult:
    return sweep(given.weight, given.statistics, on or grid(), SweepSettings(**changes), options)


def same(a: SweepResult, b: SweepResult) -> bool:
    """The same code, bit for bit."""
    theirs = b.code.tensors()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.code.tensors().items())


class Recorder(UniformGrid):
    """A fixed grid whose groups are single columns; keeps these as they were just before rounding."""

    group_size: int = 1
    scale_dtype: Any = "float32"

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        RECORDED.append(weight.squeeze(1).clone())
        return {"scales": torch.full((weight.shape[0], 1), 0.6), "zero_points": torch.full((weight.shape[0], 1), 4.0)}


RECORDED: list[Tensor] = []


class Steps(Grid):
    """A vector grid that needs no fit: four columns at a time to multiples of a step."""

    group_size: int = 1 << 20

    @property
    def columns_jointly(self) -> int:
        return 4

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        return {"step": torch.full((weight.shape[0], 1), 0.25)}

    def round_vectors(
        self, weight: Tensor, first: int, fit: Fit, statistics: Statistics = NO_STATISTICS
    ) -> tuple[Tensor, Fit]:
        values = (weight / fit["step"]).round() * fit["step"]
        return values, {"values": values}

    def join_vectors(self, parts: Fit, fit: Fit, shape: tuple[int, int]) -> Code:
        return Dense(parts["values"][:, : shape[1]].contiguous())


def published(
    given: Problem, levels: Tensor, alpha: float = 0.0, alpha_2: float = 0.0, beta: float = 0.0, pull_back: str = "none"
) -> Tensor:
    """The methods as printed, column by column over the whole rest, with P1 and P2 of ResComp; values [out, in]."""
    moments = given.statistics
    h, d, hd = moments["gram"], moments["cross"], given.damped()
    u = torch.linalg.cholesky(torch.linalg.inv(hd)).mT  # authors' way: explicit inverse, upper factor
    p_1 = alpha * torch.triu(d @ u.T, 1) @ u
    p_2 = alpha_2 * torch.triu((d + h) @ u.T, 1) @ u
    w, w0 = given.weight.clone(), given.weight
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        now = w[:, j].clone()
        q[:, j] = nearest(now, levels)
        e = ((now - q[:, j]) - beta * (now - w0[:, j])) / u[j, j]
        before = w.clone()
        w[:, j + 1 :] -= e[:, None] * u[j, j + 1 :]
        w[:, j + 1 :] += now[:, None] * p_1[j, j + 1 :] + (w0[:, j] - now)[:, None] * p_2[j, j + 1 :]
        if pull_back == "all-columns":
            w[:, j + 1 :] -= beta * (before - w0)[:, j + 1 :]
        elif pull_back == "next-column":
            w[:, j + 1 : j + 2] -= beta * (w - w0)[:, j + 1 : j + 2]
    return q


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    place = (values[:, None] - levels).abs().argmin(1, keepdim=True)
    return levels.gather(1, place).squeeze(1)
