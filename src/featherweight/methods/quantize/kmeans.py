"""Weighted k-means in one dimension, for many groups of sorted values at once.

Lloyd's iteration, its starts, and the exact optimum. In one dimension clusters are intervals of the sorted values, so
the optimum is a shortest path: with cost(i, j) of putting values i .. j - 1 in one cluster, best_k(j) = min over i of
best_(k-1)(i) + cost(i, j). The minimising i does not fall with j, which divide and conquer uses (Wu 1991; Gronlund et
al., arXiv 1701.07204).
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.methods.quantize.sorted_groups import SortedGroups

BINS = 128  # of the histogram that stands for a density
CHUNK = 1 << 20  # candidates of the dynamic programme that are looked at together


def lloyd(groups: SortedGroups, centroids: Tensor, limit: int) -> Tensor:
    """Ascending centroids [R, K] after `limit` iterations or at a fixed point; empty clusters keep their centroid."""
    for _ in range(limit):
        mass, first = groups.cells((centroids[:, 1:] + centroids[:, :-1]) / 2)
        moved = torch.where(mass > 0, first / torch.where(mass > 0, mass, 1.0), centroids).sort(dim=-1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def quantile_start(groups: SortedGroups, count: int) -> Tensor:
    """Values at the middles of `count` equal shares of the weight: [R, count]."""
    shares = (torch.arange(count, dtype=torch.float64, device=groups.mass.device) + 0.5) / count
    return _at_weight(groups, shares * groups.mass.unsqueeze(-1), groups.weights)


def density_start(groups: SortedGroups, count: int) -> Tensor:
    """`count` values as dense as the cube root of the density, which is optimal for many of them: [R, count].

    The rule of Panter and Dite (1951), with a histogram of BINS bins for the density.
    """
    low, high = groups.values[:, :1], groups.values[:, -1:]
    edges = low + (high - low) * torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=low.device)
    share = groups.cells(edges[:, 1:-1])[0].pow(1 / 3)
    running = torch.nn.functional.pad(share.cumsum(-1), (1, 0))
    targets = (torch.arange(count, dtype=torch.float64, device=low.device) + 0.5) / count * running[:, -1:]
    place = (torch.searchsorted(running, targets, right=True) - 1).clamp(max=BINS - 1)
    inside = (targets - running.gather(-1, place)) / share.gather(-1, place).clamp(min=1e-300)
    return edges.gather(-1, place) + inside.clamp(0, 1) * (high - low) / BINS


def plus_plus_start(groups: SortedGroups, draws: Tensor) -> Tensor:
    """Weighted k-means++: each next centroid is drawn by weight x squared distance to the ones before.

    draws : uniform numbers float64 [K], the same for all groups, so that a group's result is its own
    Returns ascending centroids [R, K].
    """
    chosen = [_at_weight(groups, (draws[0] * groups.mass).unsqueeze(-1), groups.weights)]
    distance = (groups.values - chosen[0]).square_()
    for draw in draws[1:]:
        share = groups.weights * distance
        share = torch.where(share.sum(-1, keepdim=True) > 0, share, groups.weights)
        chosen.append(_at_weight(groups, (draw * share.sum(-1)).unsqueeze(-1), share))
        distance = torch.minimum(distance, (groups.values - chosen[-1]).square_())
    return torch.cat(chosen, -1).sort(dim=-1).values


def _at_weight(groups: SortedGroups, targets: Tensor, weights: Tensor) -> Tensor:
    """The values at which the running sum of `weights` exceeds `targets` [R, m]: [R, m]."""
    running = weights.cumsum(-1)
    places = torch.searchsorted(running, targets.contiguous(), right=True)
    last = torch.searchsorted(running, running[:, -1:].contiguous())  # the last value with any weight
    return groups.values.gather(-1, torch.minimum(places, last))


def exact_centroids(groups: SortedGroups, count: int) -> Tensor:
    """The K centroids of least weighted squared error: ascending [R, K].

    Where fewer clusters do as well, the last centroids repeat.
    """
    size = groups.values.shape[1]
    rows = max(1, CHUNK // (2 * size))
    parts = [
        _exact_rows(groups, first, min(first + rows, len(groups.values)), count)
        for first in range(0, len(groups.values), rows)
    ]
    return torch.cat(parts)


def _exact_rows(groups: SortedGroups, first: int, last: int, count: int) -> Tensor:
    sums = groups.running(first, last)
    rows, size = last - first, groups.values.shape[1]
    device = groups.values.device
    ends = torch.arange(size + 1, device=device)
    best = _cost(sums, torch.zeros_like(ends).expand(rows, -1), ends.expand(rows, -1))  # one cluster [R, n + 1]
    cuts = []
    for _ in range(count - 1):
        best, cut = _next_cluster(sums, best)
        cuts.append(cut)
    upper = torch.full((rows, 1), size, device=device)
    centroids = []
    for cut in reversed([torch.zeros(rows, size + 1, dtype=torch.long, device=device), *cuts]):
        lower = cut.gather(-1, upper)
        mass, total = (s.gather(-1, upper) - s.gather(-1, lower) for s in sums[:2])
        mean = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), torch.nan)
        centroids.append(mean)
        upper = lower
    return _filled(torch.cat(centroids[::-1], -1))


def _filled(centroids: Tensor) -> Tensor:
    """Empty clusters (NaN) take the largest centroid; ascending."""
    largest = centroids.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    return torch.where(centroids.isnan(), largest, centroids).sort(dim=-1).values


def _cost(sums: tuple[Tensor, Tensor, Tensor], lower: Tensor, upper: Tensor) -> Tensor:
    """Weighted squared error of values lower .. upper - 1 around their mean; [R, m] each."""
    mass, first, second = (s.gather(-1, upper) - s.gather(-1, lower) for s in sums)
    return (second - first * first / torch.where(mass > 0, mass, 1.0)).clamp(min=0)


def _next_cluster(sums: tuple[Tensor, Tensor, Tensor], best: Tensor) -> tuple[Tensor, Tensor]:
    """best_k and where its last cluster begins, [R, n + 1], from best_(k-1).

    Positions are settled in the order of a binary search: those of one depth lie between settled neighbours, whose
    cuts bound theirs, so a depth looks at little more than n candidates a row.
    """
    rows, size = best.shape[0], best.shape[1] - 1
    found, device = best.clone(), best.device
    cut = torch.zeros(rows, size + 1, dtype=torch.long, device=device)
    found[:, 0] = 0
    settled = torch.tensor([0, size + 1], device=device)
    bounds = torch.tensor([0, size], device=device).repeat(rows, 1)
    while len(settled) < size + 2:
        gaps = settled[1:] - settled[:-1] > 1
        middles = ((settled[1:] + settled[:-1]) // 2)[gaps]
        lower = bounds[:, :-1][:, gaps]
        upper = torch.minimum(bounds[:, 1:][:, gaps], middles)
        values, places = _least(sums, best, lower, upper, middles)
        found[:, middles], cut[:, middles] = values, places
        settled, order = torch.cat([settled, middles]).sort()
        bounds = torch.cat([bounds, places], -1)[:, order]
    return found, cut


def _least(
    sums: tuple[Tensor, Tensor, Tensor], best: Tensor, lower: Tensor, upper: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """The least best(i) + cost(i, end) over lower <= i <= upper, and its first i: [R, m] each, ends [m]."""
    rows, width = best.shape
    lengths = (upper - lower + 1).reshape(-1)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=best.device), lengths)
    begin = lengths.cumsum(0) - lengths
    candidates = torch.arange(len(segment), device=best.device) - begin[segment] + lower.reshape(-1)[segment]
    row = segment // len(ends)
    at, end = row * width + candidates, row * width + ends[segment % len(ends)]
    mass, first, second = (s.reshape(-1)[end] - s.reshape(-1)[at] for s in sums)
    cost = (second - first * first / torch.where(mass > 0, mass, 1.0)).clamp(min=0)
    total = best.reshape(-1)[at] + cost
    none = torch.full((len(lengths),), torch.inf, dtype=total.dtype, device=total.device)
    least = none.scatter_reduce(0, segment, total, "amin")
    position = torch.where(total == least[segment], candidates, width)
    behind = torch.full((len(lengths),), width, device=total.device)
    place = behind.scatter_reduce(0, segment, position, "amin")
    return least.view(rows, -1), place.view(rows, -1)
