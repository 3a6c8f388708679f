"""Weighted values in ascending order with running sums: what one-dimensional quantisers are fitted with.

Rounding to the nearest of L levels cuts the sorted values of a group at the middles between levels. With running sums
of weight, weight x value and weight x value^2, the statistics of the cells are differences of looked-up numbers, so a
round of an alternating fit costs O(L log n) a group instead of O(L n).
"""

from __future__ import annotations

import torch
from torch import Tensor


class SortedGroups:
    """`values` [R, n] of R groups; `weights` [R, n] or [n], zero for padding, None for ones. Everything is float64."""

    def __init__(self, values: Tensor, weights: Tensor | None = None) -> None:
        self.values, order = values.double().contiguous().sort(dim=-1, stable=True)
        if weights is None:
            weights = torch.ones((), dtype=torch.float64, device=values.device)
        self.weights = weights.double().expand_as(self.values).gather(-1, order)
        weighted = self.weights * self.values
        self._mass = _running(self.weights)
        self._first = _running(weighted)
        self._second = _running(weighted * self.values)

    @property
    def mass(self) -> Tensor:
        """Sum of weights of every group [R]."""
        return self._mass[:, -1]

    @property
    def first(self) -> Tensor:
        """Sum of weight x value of every group [R]."""
        return self._first[:, -1]

    @property
    def second(self) -> Tensor:
        """Sum of weight x value^2 of every group [R]."""
        return self._second[:, -1]

    def running(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Running sums of weight, weight x value, weight x value^2 of groups first .. last - 1: [., n + 1] each."""
        return self._mass[first:last], self._first[first:last], self._second[first:last]

    def cells(self, boundaries: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of weights and of weight x value in each cell: two [R, L].

        boundaries : [R, L - 1], ascending; a value on a boundary belongs to the lower cell
        """
        ends = torch.searchsorted(self.values, boundaries.contiguous(), right=True)
        return _between(self._mass, ends), _between(self._first, ends)

    def squared_error(self, levels: Tensor) -> Tensor:
        """Sum of weight x (value - nearest level)^2 for ascending levels [R, L]: [R], never negative."""
        mass, first = self.cells((levels[:, 1:] + levels[:, :-1]) / 2)
        return (self.second - (2 * levels * first - levels * levels * mass).sum(-1)).clamp(min=0)


def _running(values: Tensor) -> Tensor:
    """Running sums with a leading zero: [R, n + 1]."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def _between(running: Tensor, ends: Tensor) -> Tensor:
    """Sums between consecutive `ends` [R, L - 1], from the beginning and to the end of a row: [R, L]."""
    at = running.gather(-1, ends)
    return torch.cat([at, running[:, -1:]], -1) - torch.cat([torch.zeros_like(running[:, :1]), at], -1)
