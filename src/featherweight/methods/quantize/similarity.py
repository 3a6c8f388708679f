"""Structural similarity-based reordering of columns (SSR): those that look alike share a group.

PT2-LLM: Post-Training Ternarization for Large Language Models (arXiv 2510.03267), the light form, eq. 16: of the
columns that remain, those whose cosine with their mean is largest make the next group. Inside a sweep the columns that
remain have taken up the errors of earlier groups, and the order is known only group by group; `Remaining` therefore
makes the rows of the Hessian's factor for whatever columns come next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def most_similar(columns: Tensor, count: int) -> Tensor:
    """Places of the `count` columns of [rows, n] with the largest cosine to the mean of all: int64, rising.

    Equal ones in their order; columns of zeros count as orthogonal.
    """
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    cosines = (columns.sum(1) @ columns) / lengths  # times the length of the sum, the same for all
    return cosines.argsort(descending=True, stable=True)[:count].sort().values


def with_first(chosen: Tensor, count: int) -> Tensor:
    """The places 0 to count - 1, the chosen ones first, the others behind in their order: int64."""
    others = torch.ones(count, dtype=torch.bool, device=chosen.device)
    others[chosen] = False
    return torch.cat([chosen, others.nonzero().flatten()])


class Remaining:
    """The inverse of the second moment of the columns that are not rounded yet, as F with F'F = H_d^-1.

    Starts from the triangular factor U. `take` turns F by Householder reflections until the columns taken are upper
    triangular: the rows this gives are those of the factor in the new order, and what is below them is F of the rest.
    As no inverse is formed or subtracted from, float32 does where it does for U.
    """

    def __init__(self, upper: Tensor) -> None:
        self.factor = upper.clone()

    def take(self, places: Tensor, count: int) -> Tensor:
        """Rows [count, n] of the factor of all n columns that remain, put into the order `places`; the first `count`
        of them are then gone."""
        taken, others = self.factor[:, places[:count]], self.factor[:, places[count:]]
        reflectors, tau = torch.geqrf(taken)
        if others.shape[1]:
            others = torch.ormqr(reflectors, tau, others, left=True, transpose=True)
        self.factor = others[count:]
        triangle = reflectors[:count].triu()
        signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle.dtype)
        return torch.cat([triangle, others[:count]], 1) * signs.unsqueeze(1)
