"""A matrix as the product of a sparse and a small dense one, in closed form, under the second moment of its input.

ROCKET (arXiv 2602.11008), steps 1 to 5, in the orientation of this package: W [out, in] becomes V D, V [out, r] with
few entries a row, D [r, in] a dictionary of r atoms. With G = R R' the second moment of the input,
tr(E G E') = |E R|^2, so that everything is fitted to M = W R. Its best approximation of rank r is V = M B, B [in, r]
the first right singular vectors, with D = B'. Of V the entries of largest importance are kept, and D is fitted again to
what is left of V by least squares; in the space of the weights it is then multiplied by R^-1. With every entry kept
this is the truncated singular value decomposition in the whitened space (SVD-LLM, arXiv 2403.07378); without a second
moment R is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_FLOOR = 1e-7  # of the mean diagonal, where a second moment has no Cholesky factor as it is; then tenfold


def root_of(gram: Tensor, damping: float = 0.0) -> Tensor:
    """Lower triangular R with R R' = gram + damping * mean diagonal, which grows until there is one.

    gram : float64 [in, in]. ValueError if it is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the gram matrix of its input is not finite")
    mean = float(gram.diagonal().mean())
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (mean if mean > 0 else 1.0)
    while True:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(gram + damping * unit)
        if int(failed) == 0:
            return root
        damping = max(10 * damping, FIRST_FLOOR)


@dataclass(frozen=True)
class Whitened:
    """A matrix in the space in which its output's error is a distance, with its singular vectors.

    Attributes
    ----------
    weight : float64 [out, in], the matrix itself
    matrix : float64 [out, in], M = W R
    root : R, float64 [in, in]; None where nothing is known of the input
    coefficients : float64 [out, n], n = min(out, in): M B for all singular vectors, the largest first
    atoms : float64 [n, in], B'
    """

    weight: Tensor
    matrix: Tensor
    root: Tensor | None
    coefficients: Tensor
    atoms: Tensor

    @classmethod
    def of(cls, weight: Tensor, root: Tensor | None) -> Whitened:
        """weight [out, in]; everything on its device."""
        weight = weight.double()
        matrix = weight if root is None else weight @ root
        largest = float(matrix.abs().amax())
        unit = largest if largest > 0 else 1.0
        scaled = matrix / unit  # squares of 1e200 overflow
        tiny = torch.finfo(torch.float64).tiny
        if matrix.shape[0] < matrix.shape[1]:
            left = torch.linalg.eigh(scaled @ scaled.T).eigenvectors.flip(1)
            rows = left.T @ scaled
            sizes = rows.norm(dim=1)
            return cls(weight, matrix, root, left * sizes * unit, rows / sizes.clamp(min=tiny).unsqueeze(1))
        atoms = torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1).T.contiguous()
        return cls(weight, matrix, root, matrix @ atoms.T, atoms)

    def lengths(self, rank: int) -> Tensor:
        """|b_i R^-1| of the first atoms in the space of the weights: float64 [rank]."""
        found: Tensor = torch.linalg.vector_norm(self.unwhitened(self.atoms[:rank]), dim=1)
        return found

    def unwhitened(self, dictionary: Tensor) -> Tensor:
        """D R^-1 for D [r, in]."""
        if self.root is None:
            return dictionary
        found: Tensor = torch.linalg.solve_triangular(self.root, dictionary, upper=False, left=False)
        return found

    def weight_error(self, left: Tensor, right: Tensor) -> float:
        """|W - left right|, `right` in the space of the weights."""
        return float((self.weight - left @ right).norm())

    def output_error(self, left: Tensor, dictionary: Tensor) -> float:
        """|M - left dictionary|, in the whitened space."""
        return float((self.matrix - left @ dictionary).norm())


def chosen_entries(importance: Tensor, entries: int, reactivated: float) -> Tensor:
    """Which coefficients are kept, bool [out, r], exactly `entries` of them: ROCKET's two stages.

    In every row int(r (share - reactivated)) are kept, at least one where there are so many; the others are the most
    important of the whole matrix that are left. Of equal ones the first.

    importance : [out, r], not negative
    """
    rows, rank = importance.shape
    share = entries / (rows * rank)
    each = min(rank, max(1, int(rank * (share - reactivated) + 1e-9)), entries // rows)
    kept = torch.zeros(rows, rank, dtype=torch.bool, device=importance.device)
    if each:
        order = importance.sort(dim=1, descending=True, stable=True).indices
        kept.scatter_(1, order[:, :each], True)
    rest = entries - each * rows
    if rest:
        free = importance.masked_fill(kept, -1.0).flatten()
        kept.view(-1)[free.sort(descending=True, stable=True).indices[:rest]] = True
    return kept


def refitted(matrix: Tensor, coefficients: Tensor, ridge: float) -> Tensor:
    """D that minimises |M - V D|^2 + mu |D|^2, mu = ridge * mean diagonal of V'V: float64 [r, in].

    matrix : M [out, in]; coefficients : V [out, r]. An atom that no row uses becomes 0.
    """
    gram = coefficients.T @ coefficients
    mean = float(gram.diagonal().mean())
    unused = gram.diagonal() == 0
    system = gram + torch.diag(unused.to(gram.dtype)) * (mean if mean > 0 else 1.0)
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (mean if mean > 0 else 1.0)
    wished = coefficients.T @ matrix
    while True:
        factor, failed = torch.linalg.cholesky_ex(system + ridge * unit)
        if int(failed) == 0:
            return torch.cholesky_solve(wished, factor)
        ridge = max(10 * ridge, FIRST_FLOOR)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of `left` as long as rows of `right`: small and large numbers meet half way."""
    ours, theirs = left.norm(dim=0), right.norm(dim=1)
    used = (ours > 0) & (theirs > 0)
    scale = torch.where(used, (theirs / ours.where(used, 1.0)).sqrt(), torch.ones_like(ours)).where(used, 1.0)
    return left * scale, right / scale.unsqueeze(1)
