"""The leading singular triplets of a matrix, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 512  # up to this many rows or columns all singular values are computed
OVERSAMPLING, STEPS = 8, 14


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading triplets: [out, rank], [rank], [rank, in], in float64; the same in every run.

    Large matrices by a randomised block Krylov method (Musco and Musco, arXiv 1504.05477), whose error does not depend
    on gaps between singular values: quantisation errors have none. Products are taken in the matrix's dtype.
    """
    if min(matrix.shape) <= EXACT:
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    unit = float(matrix.abs().amax())  # squares of 1e30 overflow
    if unit == 0:
        rows, columns = matrix.shape
        zeros = matrix.double().new_zeros
        return zeros(rows, rank), zeros(rank), zeros(rank, columns)
    matrix = matrix / unit
    basis = _krylov_basis(matrix, rank)
    projected = (basis.to(matrix.dtype).T @ matrix).double()
    found = basis @ torch.linalg.eigh(projected @ projected.T).eigenvectors[:, -rank:].flip(1)
    rows_of = (found.to(matrix.dtype).T @ matrix).double()
    sizes = rows_of.norm(dim=1)
    return found, sizes * unit, rows_of / sizes.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)


def _krylov_basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal basis float64 [out, (rank + oversampling) steps] of a random start and its products with E E'."""
    generator = torch.Generator("cpu").manual_seed(0)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, dtype=matrix.dtype, generator=generator, device="cpu")
    start = start.to(matrix.device)
    basis: Tensor = torch.linalg.qr((matrix @ start).double()).Q
    block = basis
    for _ in range(min(STEPS, min(matrix.shape) // width) - 1):
        block = (matrix @ (block.to(matrix.dtype).T @ matrix).T).double()
        for _ in range(2):  # twice: once leaves parts of the order of the rounding error times the condition
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], 1)
    return basis
