"""The dense orthogonal factors of block rotations: an order is m 2^p, and its matrix M of order m times Sylvester's.

M is a Hadamard matrix of order 1, 12, 20 or 28 where the order is a multiple of it with a power of two (R. Paley, On
Orthogonal Matrices, 1933; constructions I for 12 and 20, II for 28), and so it is +-1 over the root. Elsewhere m is the
odd part of the order, up to 63. No matrix of odd order has entries of one size; how uneven they are is the largest one
times root(m), the incoherence (QuIP, arXiv 2307.13304):

- m = 3 mod 4, but 51: c D + b J with D the core of a Hadamard matrix of order m + 1 (its first row and column are made
  1 and taken off), negated so that its rows sum to 1; J is all 1. D D' = (m + 1) I - J, so this is orthogonal with
  c = 1 / root(m + 1) and b = c / (root(m + 1) + 1). Incoherence 1.10 (63) to 1.18 (7).
- m = 1 mod 4, and 51: the discrete Hartley transform, cas(2 pi i j / m) / root(m), cas x = cos x + sin x (R. Bracewell,
  1983). 1.40 (5) to 1.41, as has the DCT-II; a Householder matrix has 2 - 4 / m times root(m) / 2, 7.7 at 61.

The table that files are decoded with is root(m) M, made in float64 and rounded to float32. Square roots and divisions
are exactly rounded everywhere. Sines are not, but no entry lies as near to the middle of two floats as they may be off.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST_ODD = 63  # a dense factor of order m costs m multiplications a value

PALEY = {12: (11, 1), 20: (19, 1), 28: (13, 2), 36: (17, 2), 44: (43, 1), 60: (59, 1)}  # order: (prime, construction)

EXPECTED = f"an order whose odd part is {LARGEST_ODD} or less"


def kernel_order(order: int) -> int | None:
    """The order m of the dense factor: 1, 12, 20, 28, or the odd part of the order; None where there is none."""
    odd = order // (order & -order) if order > 0 else LARGEST_ODD + 2
    if odd > LARGEST_ODD:
        return None
    return 4 * odd if odd in (3, 5, 7) and order % 4 == 0 else odd


def divides(order: int, columns: int) -> bool:
    """Whether there is a rotation of this order that as many columns consist of."""
    return kernel_order(order) is not None and columns % order == 0


def largest_order(columns: int) -> int:
    """The largest order that divides a width: the width itself if its odd part is small enough."""
    power = columns & -columns
    odd = columns // power
    return power * max(n for n in range(1, LARGEST_ODD + 1, 2) if odd % n == 0)


def nearest_order(order: int, columns: int) -> int:
    """The order that divides a width and lies nearest to the one asked for; of two the smaller."""
    power, found = columns & -columns, 1
    odd = columns // power
    for part in range(1, LARGEST_ODD + 1, 2):
        for shift in range(power.bit_length() if odd % part == 0 else 0):
            found = min(found, part << shift, key=lambda n: (abs(n - order), n))
    return found


def refusal(order: int, columns: int) -> str:
    """The sentence for a block for which `divides` does not hold."""
    return f"block is {order}, expected {EXPECTED}, that divides {columns}; nearest is {nearest_order(order, columns)}"


@functools.lru_cache(maxsize=8)
def paley_matrix(order: int) -> Tensor:
    """The Hadamard matrix int8 [order, order] of an order in `PALEY`; order 1 is [[1]]."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    prime, construction = PALEY[order]
    squares = {x * x % prime for x in range(1, prime)}
    character = [0] + [1 if x in squares else -1 for x in range(1, prime)]
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.int8, device="cpu")
    core[0, 1:] = 1
    core[1:, 0] = -1 if construction == 1 else 1  # skew for primes 3 mod 4, symmetric for primes 1 mod 4
    for i in range(prime):
        for j in range(prime):
            core[i + 1, j + 1] = character[(i - j) % prime]
    unit = torch.eye(prime + 1, dtype=torch.int8, device="cpu")
    if construction == 1:
        return unit + core
    pairs = (([[1, 1], [1, -1]], core), ([[1, -1], [-1, -1]], unit))
    first, second = (torch.kron(c, torch.tensor(p, dtype=torch.int8, device="cpu")) for p, c in pairs)
    return first + second


def _core(order: int) -> Tensor:
    """D of the module's text: int8 [order, order], +-1."""
    size = order + 1
    power = size & -size
    paley = 1 if size == power else 4 * (size // power)
    matrix = paley_matrix(paley)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu"))
    matrix = matrix * matrix[0]
    return -(matrix * matrix[:, :1])[1:, 1:]


@functools.lru_cache(maxsize=32)
def dense_factor(order: int) -> Tensor:
    """root(m) M, float64 [m, m] on the CPU, for what `kernel_order` gives. Not to be written to: it is kept."""
    if order % 2 == 0 or order == 1:
        return paley_matrix(order).double()
    if order % 4 == 3 and order != 51:
        root = math.sqrt(order + 1)
        # Two divisions and two roots, in this order.
        return math.sqrt(order) / root * (_core(order).double() + 1 / (root + 1))
    angles = [2 * math.pi * k / order for k in range(order)]
    cas = torch.tensor([math.cos(a) + math.sin(a) for a in angles], dtype=torch.float64, device="cpu")
    index = torch.arange(order, device="cpu")
    return cas[torch.outer(index, index) % order]
