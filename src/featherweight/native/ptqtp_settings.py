"""Settings and result of the PTQTP trit-plane solver, shared by its PyTorch and native forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import NonFiniteError

TieOrder = Literal["lexicographic", "paired"]

MAX_PLANES = 3


@dataclass(frozen=True)
class TritPlaneSettings:
    """How a matrix is split into trit-planes. The defaults are the published algorithm (arXiv 2509.16989).

    Attributes
    ----------
    planes : number of ternary planes K, 1 to 3.
    group_size : consecutive input columns that share scales; the last group of a row may be shorter.
    tied : one scale s per group and plane scales (3^(K-1) s, ..., 3 s, s), so a weight is s times an integer.
        The scale comes from a sweep, not from the alternating loop. With one plane it changes nothing but the
    shape. tolerance : the loop stops when no group of the matrix moved its scales by this much (Euclidean,
    absolute). max_iterations: at most this many iterations, 1 to 255.
    ridge : initial ridge lambda of every group's normal equations.
    ridge_max : upper limit of lambda under the condition guard.
    condition_threshold : Frobenius condition number from which lambda is raised.
    tie_order : which of several equally near code tuples wins, which also decides the local optimum reached:
        "lexicographic" runs over -1, 0, 1 with the last plane fastest; "paired" over 0, -1, 1.
    starts : 1 is the published start. 2 adds the greedy residual start, 3 also the other tie order; then every group
        runs to its own fixed point and keeps the solution with the smallest squared error.
    closing : after the loop, one trit step against the scales as they are stored (not in the paper).
    final_least_squares : after the loop, one scale solve for the final trits (not in the paper).
    canonical : return planes with scales[0] >= scales[1] >= ... >= 0; otherwise as the loop left them.
    """

    planes: int = 2
    group_size: int = 128
    tied: bool = False
    tolerance: float = 1e-4
    max_iterations: int = 50
    ridge: float = 1e-8
    ridge_max: float = 1.0
    condition_threshold: float = 1e12
    tie_order: TieOrder = "lexicographic"
    starts: int = 1
    closing: bool = False
    final_least_squares: bool = False
    canonical: bool = True

    def __post_init__(self) -> None:
        checks = {
            "planes must be 1, 2 or 3": self.planes in (1, 2, 3),
            "group_size must be at least 1": self.group_size >= 1,
            "tolerance must not be negative": self.tolerance >= 0,
            "max_iterations must be between 1 and 255": 1 <= self.max_iterations <= 255,
            "ridge must be positive and at most ridge_max": 0 < self.ridge <= self.ridge_max,
            "condition_threshold must be more than 1": self.condition_threshold > 1,
            "tie_order must be 'lexicographic' or 'paired'": self.tie_order in ("lexicographic", "paired"),
            "starts must be 1, 2 or 3": self.starts in (1, 2, 3),
        }
        for text, holds in checks.items():
            if not holds:
                raise ValueError(f"trit-plane settings: {text}")

    @property
    def one_scale(self) -> bool:
        """Whether the tied sweep is used; one tied plane is one free plane."""
        return self.tied and self.planes > 1


@dataclass(frozen=True)
class TritPlaneSolution:
    """Trit-planes of a matrix [n, d] with g = ceil(d / group_size) groups a row.

    Attributes
    ----------
    codes : uint8 [n, d], sum over planes of 3^(K-1-k) (t_k + 1); plane 0 is the most significant digit.
    scales : float64 [n, g, K], or [n, g] when tied.
    steps : uint8 [n, g], the iteration whose scales the group has (at its exact fixed point or at the stop).
    iterations : the iteration in which the loop stopped, for the whole matrix; 0 for the tied sweep.
    planes : K.
    group_size : G.
    """

    codes: Tensor
    scales: Tensor
    steps: Tensor
    iterations: int
    planes: int
    group_size: int

    def trits(self) -> Tensor:
        """int8 [K, n, d], values -1, 0, 1."""
        return split_codes(self.codes, self.planes)

    def decode(self) -> Tensor:
        """float64 [n, d]: sum over planes of scale times trit, with the scales as solved (not rounded)."""
        d = self.codes.shape[1]
        group = torch.arange(d, device=self.codes.device) // self.group_size
        total: Tensor
        if self.scales.dim() == 2:
            total = self.scales[:, group] * (self.codes.to(torch.float64) - (3**self.planes - 1) // 2)
        else:
            total = torch.zeros(self.codes.shape, dtype=torch.float64, device=self.codes.device)
            for k, plane in enumerate(self.trits()):
                total = total + self.scales[:, group, k] * plane
        return total


class NonFiniteWeightError(NonFiniteError):
    """A NaN or an infinity at `row`, `column` of the matrix given to the solver."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__(
            f"the weight at row {row}, column {column} is NaN or infinite; trit-planes need finite weights"
        )
        self.row = row
        self.column = column


def split_codes(codes: Tensor, planes: int) -> Tensor:
    """Trits int8 [K, ...] of joint codes uint8 [...]."""
    trits = torch.empty(planes, *codes.shape, dtype=torch.int8, device=codes.device)
    rest = codes.to(torch.int16)
    for k in reversed(range(planes)):
        third = (rest * 11) >> 5  # rest // 3 for rest < 27, without the slow integer division
        trits[k] = rest - 3 * third - 1
        rest = third
    return trits


def join_trits(trits: Tensor) -> Tensor:
    """Joint codes uint8 [...] of trits int8 [K, ...]."""
    codes = torch.zeros(trits.shape[1:], dtype=torch.uint8, device=trits.device)
    for plane in trits:
        codes = codes * 3 + (plane + 1).to(torch.uint8)
    return codes
