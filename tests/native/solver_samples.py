"""A plain form of the published loop to hold the solvers to, and samples of weights."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def published_loop(
    w: Tensor, *, tolerance: float = 1e-4, most: int = 50, digits: tuple[int, ...] = (-1, 0, 1)
) -> tuple[Tensor, Tensor, int, list[float]]:
    """The card's loop for K = 2 and whole groups [R, G], written down once more: no freezing, no thresholds, no masks.

    Iteration 1 solves the (nearly singular) normal equations of t = sign(w) and takes ties by the order of candidates
    up to rounding. Returns scales [R, 2], trits [2, R, G], the stop iteration and the relative error after every
    iteration.
    """
    w = w.to(torch.float64)
    sign = torch.where(w >= 0, 1.0, -1.0).to(torch.float64)
    trits = torch.stack([sign, sign])
    scales = torch.ones(len(w), 2, dtype=torch.float64)
    errors = []
    for t in range(1, most + 1):
        s11, s22, s12 = (trits[0] ** 2).sum(1) + 1e-8, (trits[1] ** 2).sum(1) + 1e-8, (trits[0] * trits[1]).sum(1)
        b1, b2 = (trits[0] * w).sum(1), (trits[1] * w).sum(1)
        det = s11 * s22 - s12**2
        new = torch.stack([(s22 * b1 - s12 * b2) / det, (s11 * b2 - s12 * b1) / det], 1)
        if t == 1:  # exactly equal by symmetry; rounding must not break the tie
            new = new.mean(1, keepdim=True).expand(-1, 2).clone()
        pairs = list(itertools.product(digits, repeat=2))
        distance = torch.stack([(w - (a * new[:, :1] + b * new[:, 1:])).abs() for a, b in pairs])
        least = distance.min(0).values
        first = (distance <= least + 1e-13 * w.abs().max()).to(torch.uint8).argmax(0) if t == 1 else distance.argmin(0)
        table = torch.tensor(pairs, dtype=torch.float64)
        trits = table[first].permute(2, 0, 1)
        change = (new - scales).norm(dim=1).max()
        scales = new
        decoded = scales[:, :1] * trits[0] + scales[:, 1:] * trits[1]
        errors.append(float((w - decoded).norm() / w.norm()))
        if t > 1 and change < tolerance:
            break
    return scales, trits, t, errors


def golden(size: int) -> Tensor:
    """w_j = sin(1.7 j + 0.3 j^2) + 0.5 cos(2.9 j), j = 1..size, float64 [1, size]."""
    j = torch.arange(1, size + 1, dtype=torch.float64)
    return (torch.sin(1.7 * j + 0.3 * j * j) + 0.5 * torch.cos(2.9 * j))[None]


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    weight = weight.to(torch.float64)
    return float((weight - decoded).norm() / weight.norm())


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def laplace(*shape: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)
