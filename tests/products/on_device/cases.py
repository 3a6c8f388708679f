"""Random codes of every kind that has a GPU operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from featherweight.storage.codes.base import Code
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sherry import Sherry, quartets_of
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

Shape = tuple[int, int]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) + 0.1


def groups(shape: Shape, group_size: int) -> int:
    return -(-shape[1] // group_size)


def trit_planes(shape: Shape, planes: int, group_size: int, tied: bool = False, **named: Any) -> TritPlanes:
    trits = torch.randint(-1, 2, (planes, *shape), generator=generator(planes), dtype=torch.int8)
    per_group = () if tied else (planes,)
    return TritPlanes.encode(
        trits, scales(shape[0], groups(shape, group_size), *per_group), group_size, tied=tied, **named
    )


def uniform(shape: Shape, bits: int, group_size: int, symmetric: bool = False, **named: Any) -> Uniform:
    codes = torch.randint(0, 1 << bits, shape, generator=generator(bits), dtype=torch.uint8)
    grouped = (shape[0], groups(shape, group_size))
    zeros = torch.randint(0, 1 << bits, grouped, generator=generator(2), dtype=torch.uint8)
    return Uniform.encode(codes, scales(*grouped), None if symmetric else zeros, bits, group_size, **named)


def codebook(shape: Shape, bits: int, group_size: int | None = None) -> Codebook:
    codes = torch.randint(0, 1 << bits, shape, generator=generator(bits), dtype=torch.uint8)
    count = 1 if group_size is None else groups(shape, group_size)
    return Codebook.encode(codes, torch.randn(shape[0], count, 1 << bits, generator=generator(3)), group_size)


def sherry(shape: Shape, group_size: int, lane_stride: int = 1) -> Sherry:
    codes = torch.randint(0, 32, (shape[0], quartets_of(shape[1], lane_stride)), generator=generator(4))
    stored = scales(shape[0], groups(shape, group_size)).half()
    return Sherry.encode(codes.to(torch.uint8), stored, shape, group_size, lane_stride)


def dense(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Dense:
    return Dense(torch.randn(shape, generator=generator(5)).to(dtype))


def low_rank(shape: Shape, rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    left, right = (torch.randn(n, generator=generator(6)) for n in ((shape[0], rank), (rank, shape[1])))
    return LowRank.encode(left, right, dtype)


def sparse(shape: Shape, share: float = 0.1) -> Sparse:
    matrix = torch.randn(shape, generator=generator(7))
    return Sparse.encode(matrix, torch.rand(shape, generator=generator(8)) < share)


def call(code: Code, tokens: int, dtype: torch.dtype, packing: str, precision: str) -> Tensor:
    """`linear` of random activations and a bias."""
    from featherweight.model.products.triton import linear, pack_terms  # needs Triton, codes do not

    operands = pack_terms(code.spec, code.tensors(), packing)  # type: ignore[arg-type]
    x = torch.randn(tokens, code.shape[1], generator=generator(9)).to(dtype)
    return linear(x, operands, torch.zeros(code.shape[0], dtype=dtype), precision)  # type: ignore[arg-type]


def for_compilation(whole: bool) -> Iterator[tuple[Code, int, torch.dtype, str, str]]:
    """One case for each path through the kernels, as (code, tokens, dtype, packing, precision).

    whole : also those that another case has but for the type or the number of tokens
    """
    shape = (256, 512)
    half, brain = torch.float16, torch.bfloat16
    two_free, two_tied = trit_planes(shape, 2, 128), trit_planes(shape, 2, 128, tied=True)
    log8 = trit_planes(shape, 3, 32, tied=True, scale_dtype="log8")
    four = uniform(shape, 4, 128, symmetric=True)
    for code in (two_free, two_tied, log8, uniform(shape, 3, 128), four, codebook(shape, 4), sherry(shape, 128)):
        yield code, 1, half, "base3", "float"
        if whole or any(code is one for one in (two_tied, four)):
            yield code, 16, brain, "base3", "float"
    yield two_free, 1, half, "2bit", "float"
    if whole:
        yield two_free, 16, brain, "2bit", "float"
    yield two_tied, 4, torch.float32, "2bit", "float"
    yield two_tied, 512, brain, "2bit", "float"
    yield Hadamard(two_tied, 512, 3), 512, brain, "2bit", "int8"
    yield two_tied, 1, brain, "2bit", "int8"
    yield two_free, 4, half, "2bit", "int8"
    yield uniform(shape, 4, 32), 1, brain, "2bit", "int8"
    yield Hadamard(uniform((256, 48), 4, 32), 12, 3), 16, half, "2bit", "int8"
    if whole:
        yield Hadamard(uniform((256, 48), 4, 32), 12, 3), 16, half, "2bit", "float"
    yield Hadamard(uniform((256, 72), 4, 8), 72, 3), 16, half, "2bit", "int8"
    yield Sum((two_tied, low_rank(shape, 8), sparse(shape))), 1, half, "base3", "float"
