"""Scales of trit-planes by alternating weighted least squares: what a Hessian sweep fits its groups with.

The published solver (`featherweight.native.ptqtp`) knows no weights. Here every column has one, the second moment of
its input, and there is one basis for free, tied and 3:2-tied planes: the value of joint code c in a group with scales s
is sum_p s_p basis[p, c]. Rounding and least squares alternate from several starts; the best of each group is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.native.level_fit import fit_levels

# Starting scales over the root mean square of a group, near the fixed points for a normal distribution.
FREE_STARTS = {1: ((1.2,), (0.95,)), 2: ((0.95, 0.63), (1.2, 0.4)), 3: ((1.1, 0.73, 0.27), (1.2, 0.4, 0.133))}
TIED_REACH = (2.05, 2.5)  # the largest level over the root mean square
ROUNDS = 8


def fit_scales(weight: Tensor, column_weights: Tensor, basis: Tensor, group_size: int) -> Tensor:
    """float32 scales [out, groups, P] for weight [out, columns], each >= 0.

    column_weights : [columns], >= 0
    basis : [P, 3^K] value of every joint code; P = 1 for tied planes
    """
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    size = min(group_size, columns)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - columns)).view(rows, groups, size)
    importance = torch.nn.functional.pad(column_weights.float(), (0, groups * size - columns)).view(groups, size)
    basis = basis.float()
    unit = _power_of_two(padded.abs().amax(-1))  # squares of 1e30 overflow
    padded = padded / unit.unsqueeze(-1)
    importance = importance / _power_of_two(importance.amax())
    best = torch.full((rows, groups), float("inf"), device=padded.device)
    scales = torch.zeros(rows, groups, len(basis), device=padded.device)
    mass = importance.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    spread = ((padded.square() * importance).sum(-1) / mass).sqrt()
    if len(basis) == 1:
        return _one_scale(padded, importance, basis[0], spread).unsqueeze(-1).abs() * unit.unsqueeze(-1)
    for start in _starts(basis):
        found = spread.unsqueeze(-1) * torch.tensor(start, device=spread.device)
        for _ in range(ROUNDS):
            found = _least_squares(padded, importance, basis, _nearest(padded, found @ basis), found)
        levels = found @ basis
        value = levels.gather(-1, _nearest(padded, levels))
        error = ((padded - value).square() * importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better.unsqueeze(-1), found, scales)
    return scales.abs() * unit.unsqueeze(-1)


def _one_scale(weight: Tensor, importance: Tensor, digits: Tensor, spread: Tensor) -> Tensor:
    """The better of what the starts lead to, [out, groups], where all levels are multiples of one scale."""
    ascending = digits.sort()[0]
    best, scales = torch.full_like(spread, torch.inf), torch.zeros_like(spread)
    for (start,) in _starts(digits.unsqueeze(0)):
        found, error = fit_levels(weight, importance, ascending, spread * start, ROUNDS)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, found, scales)
    return scales


def _power_of_two(values: Tensor) -> Tensor:
    """A power of two near each value >= 0, 1 for 0: scaling by it is exact."""
    return torch.where(values > 0, torch.ldexp(torch.ones_like(values), torch.frexp(values)[1]), 1.0)


def _starts(basis: Tensor) -> list[tuple[float, ...]]:
    if len(basis) > 1 or basis.shape[1] == 3:
        return list(FREE_STARTS[len(basis)])
    return [(reach / float(basis.max()),) for reach in TIED_REACH]


def _nearest(weight: Tensor, levels: Tensor) -> Tensor:
    """Joint code of the nearest level: int64 like weight [out, groups, size], for levels [out, groups, 3^K]."""
    ordered, codes = levels.sort(dim=-1, stable=True)
    middles = (ordered[..., 1:] + ordered[..., :-1]) / 2
    return codes.gather(-1, torch.searchsorted(middles.contiguous(), weight.contiguous()))


def _least_squares(weight: Tensor, importance: Tensor, basis: Tensor, codes: Tensor, previous: Tensor) -> Tensor:
    """Best scales for these codes; the previous ones where they do not matter."""
    digits = basis.T[codes].double()  # [out, groups, size, P]
    weighted = (digits * importance.double().unsqueeze(-1)).transpose(-1, -2)
    square = weighted @ digits
    ridge = 1e-9 * square.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) + 1e-30
    square = square + torch.diag_embed(ridge.expand(square.shape[:-1]))
    right = weighted @ weight.double().unsqueeze(-1) + (ridge * previous.double()).unsqueeze(-1)
    solved: Tensor = torch.linalg.solve(square, right)
    return solved.squeeze(-1).float()
