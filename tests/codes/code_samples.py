"""A code of every kind, several of some, of any shape: what tests of codes share.

Every registered kind must be here: `test_every_kind.py` fails by name for one that is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.pyramid import Pyramid
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sherry import Sherry, quartet_codes, quartets_of
from featherweight.storage.codes.sign_factor import SignFactor
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

SHAPES = [(8, 24), (7, 20), (5, 13), (3, 1), (1, 40)]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def trit_planes(rows: int, columns: int) -> TritPlanes:
    trits = whole(-1, 2, 2, rows, columns).to(torch.int8)
    return TritPlanes.encode(trits, numbers(rows, -(-columns // 8), 2), group_size=8)


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Sparse:
    matrix = numbers(rows, columns, seed=1)
    return Sparse.encode(matrix, matrix.abs() > 1.2, dtype)


def masked(rows: int, columns: int, bits: int = 0) -> Masked:
    matrix = numbers(rows, columns, seed=1)
    return Masked.encode(matrix, matrix.abs() > 0.6, bits=bits)


def low_rank(rows: int, columns: int, dtype: torch.dtype = torch.int8) -> LowRank:
    rank = min(2, rows, columns)
    return LowRank.encode(numbers(rows, rank), numbers(rank, columns), dtype)


def signs(planes: int, rows: int, columns: int) -> torch.Tensor:
    return (whole(0, 2, planes, rows, columns) * 2 - 1).to(torch.int8)


def per_output(rows: int, columns: int) -> Uniform:
    groups = -(-rows // 4)
    return Uniform.encode(
        whole(0, 8, rows, columns), numbers(groups, columns), whole(0, 8, groups, columns), 3, 4, axis="output"
    )


def nested(rows: int, columns: int) -> Hadamard:
    """Rotated, reordered, scaled: a quantised matrix, outliers and a low-rank term."""
    total = Sum.of(Sum.of(trit_planes(rows, columns), sparse(rows, columns)), low_rank(rows, columns))
    permuted = Permuted.encode(total, torch.randperm(columns, generator=torch.Generator().manual_seed(5)))
    return Hadamard(ColumnScaled(permuted, numbers(columns).abs()), block=columns & -columns, seed=11)


def uniform(rows: int, columns: int, bits: int = 4) -> Uniform:
    groups = -(-columns // 8)
    zeros = whole(0, 1 << bits, rows, groups, seed=3)
    return Uniform.encode(whole(0, 1 << bits, rows, columns), numbers(rows, groups), zeros, bits, 8)


def with_offsets(rows: int, columns: int, bits: int = 4) -> Uniform:
    groups = -(-columns // 8)
    codes, offsets = whole(0, 1 << bits, rows, columns), numbers(rows, groups, seed=2)
    return Uniform.encode(codes, numbers(rows, groups), None, bits, 8, offsets=offsets)


def tied(rows: int, columns: int, dtype: torch.dtype | str = torch.float16) -> TritPlanes:
    trits = whole(-1, 2, 3, rows, columns).to(torch.int8)
    return TritPlanes.encode(trits, numbers(rows, -(-columns // 8)).abs(), 8, tied=True, scale_dtype=dtype)


def sherry(rows: int, columns: int) -> Sherry:
    count = quartets_of(columns, 1)
    quartets = whole(0, 2, rows, count, 4) * 2 - 1
    quartets.scatter_(2, whole(0, 4, rows, count, 1, seed=1), 0)
    return Sherry.encode(quartet_codes(quartets), numbers(rows, -(-columns // 8)).half(), (rows, columns), 8)


def pyramid(rows: int, columns: int) -> Pyramid:
    points = torch.zeros(rows, -(-columns // 4), 4, dtype=torch.int64)
    points.scatter_(2, whole(0, 4, *points.shape[:2], 1), 2)
    points += torch.nn.functional.one_hot(whole(0, 4, *points.shape[:2], seed=1), 4) * points.sign().sum(
        -1, keepdim=True
    )
    amplitudes = whole(0, 4, *points.shape[:2], seed=2)
    return Pyramid.encode((points, amplitudes), numbers(rows, -(-columns // 8)).abs().half(), columns, 8, 3, 2)


def sign_factor(rows: int, columns: int, seed: int = 0) -> SignFactor:
    rank = min(3, rows, columns)
    left, right = numbers(rows, rank, seed=seed), numbers(rank, columns, seed=seed + 1)
    return SignFactor.encode(numbers(rows, columns, seed=seed + 2) >= 0, left, right)


def dictionary(rows: int, columns: int, atoms: int = 3) -> Product:
    """A dense dictionary times sparse coefficients."""
    return Product(Dense(numbers(rows, atoms).half()), sparse(atoms, columns))


KINDS: dict[str, Callable[[int, int], Code]] = {
    "dense": lambda n, d: Dense(numbers(n, d).bfloat16()),
    "uniform": uniform,
    "uniform-offsets": with_offsets,
    "uniform-symmetric": lambda n, d: Uniform.encode(whole(0, 8, n, d), numbers(n, -(-d // 8)), None, 3, 8),
    "trit-planes": trit_planes,
    "trit-planes-tied": tied,
    "trit-planes-log8": lambda n, d: tied(n, d, "log8"),
    "uniform-output": per_output,
    "sparse": sparse,
    "sparse-float32": lambda n, d: sparse(n, d, torch.float32),
    "sparse-empty": lambda n, d: Sparse.encode(torch.zeros(n, d), torch.zeros(n, d, dtype=torch.bool)),
    "masked": masked,
    "masked-int8": lambda n, d: masked(n, d, 8),
    "masked-int4": lambda n, d: masked(n, d, 4),
    "masked-empty": lambda n, d: Masked.encode(torch.zeros(n, d), torch.zeros(n, d, dtype=torch.bool)),
    "low-rank": lambda n, d: low_rank(n, d, torch.float16),
    "low-rank-int8": low_rank,
    "codebook": lambda n, d: Codebook.encode(whole(0, 8, n, d), numbers(n, 8)),
    "codebook-groups": lambda n, d: Codebook.encode(whole(0, 4, n, d), numbers(n, -(-d // 8), 4), 8),
    "binary-planes": lambda n, d: BinaryPlanes.encode(signs(2, n, d), numbers(n, -(-d // 8), 2), 8),
    "binary-planes-strips": lambda n, d: BinaryPlanes.encode(
        signs(3, n, d), numbers(-(-n // 3), -(-d // 8), 3), 8, rows_per_scale=3
    ),
    "binary-planes-shifts": lambda n, d: BinaryPlanes.encode_shifts(
        signs(3, n, d), power_of_two_terms(numbers(1, d, 3), 3), 1, rows_per_scale=None
    ),
    "offset-trits": lambda n, d: OffsetTrits.encode(
        whole(-1, 2, n, d).to(torch.int8), numbers(n, -(-d // 8)), numbers(n, -(-d // 8), seed=2), 8
    ),
    "hadamard": lambda n, d: Hadamard(trit_planes(n, d), d & -d, 3),
    "column-scaled": lambda n, d: ColumnScaled(trit_planes(n, d), numbers(d).half()),
    "permuted": lambda n, d: Permuted.encode(per_output(n, d), torch.arange(d).flip(0)),
    "pyramid": pyramid,
    "sherry": sherry,
    "product": dictionary,
    "product-masked": lambda n, d: Product(masked(n, 6, 8), Dense(numbers(6, d).half())),
    "product-wide": lambda n, d: Product(uniform(n, n + d), trit_planes(n + d, d)),
    "product-square": lambda n, d: Product(trit_planes(n, d), uniform(d, d, 2)),
    "product-of-sums": lambda n, d: Product(
        Sum.of(uniform(n, 4), sparse(n, 4)), Permuted.encode(low_rank(4, d), torch.arange(d).flip(0))
    ),
    "product-in-a-sum": lambda n, d: Sum.of(uniform(n, d, 2), Hadamard(dictionary(n, d, 2), d & -d, 3)),
    "product-of-products": lambda n, d: Product(Product(uniform(n, 5), sparse(5, 2)), dictionary(2, d, 7)),
    "sum": lambda n, d: Sum.of(trit_planes(n, d), sparse(n, d)),
    "sign-factor": sign_factor,
    "sign-stack": lambda n, d: ColumnScaled(
        Sum.of(*(sign_factor(n, d, seed) for seed in (0, 7, 11))), numbers(d).abs().half()
    ),
    "quantized-input": lambda n, d: QuantizedInput(trit_planes(n, d), 8, 16),
    "nested": nested,
}
