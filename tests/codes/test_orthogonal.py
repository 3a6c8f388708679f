"""The matrices of block rotations: orthogonal, even, the same everywhere, and those of older files."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard, hadamard_transform, splitmix64
from featherweight.storage.codes.orthogonal import (
    dense_factor,
    divides,
    kernel_order,
    largest_order,
    nearest_order,
    paley_matrix,
)

ODD = list(range(1, 64, 2))
CORES = [n for n in ODD if n % 4 == 3 and n != 51]


def sylvester(order: int) -> Tensor:
    return torch.tensor([[1.0 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)]).double()


def transform_of(order: int, transposed: bool = False) -> Tensor:
    """The dense matrix of the fast transform, without its 1 / root(order)."""
    return hadamard_transform(torch.eye(order, dtype=torch.float64), order, transposed).T * math.sqrt(order)


def test_paley_matrices_begin_as_specified() -> None:
    assert paley_matrix(12)[:2].tolist() == [[1] * 12, [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]]
    assert paley_matrix(20)[0].tolist() == [1] * 20
    assert paley_matrix(28)[:2, :4].tolist() == [[1, -1, 1, 1], [-1, -1, 1, -1]]
    for order in (12, 20, 28, 36, 44, 60):
        matrix = paley_matrix(order).int()
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int32))


def test_every_order_has_one_dense_factor() -> None:
    """Hadamard matrices where there have always been some; else the odd part."""
    expected = {1: 1, 64: 1, 12: 12, 40: 20, 28: 28, 3: 3, 6: 3, 14: 7, 10: 5, 9: 9, 576: 9, 36: 9, 11008: 43, 63: 63}
    assert {n: kernel_order(n) for n in expected} == expected
    assert [kernel_order(n) for n in (0, -4, 65, 67 * 4, 1 << 40 | 1)] == [None] * 5


@pytest.mark.parametrize("order", ODD)
def test_odd_factors_are_orthogonal_and_even(order: int) -> None:
    matrix = dense_factor(order)
    assert torch.allclose(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) < (1.19 if order in CORES else math.sqrt(2))
    rounded = matrix.float().double()
    assert torch.allclose(rounded @ rounded.T, order * torch.eye(order, dtype=torch.float64), atol=1e-6 * order)


@pytest.mark.parametrize("order", ODD[1:])
def test_odd_factors_are_those_of_their_formula(order: int) -> None:
    matrix = dense_factor(order)
    if order not in CORES:
        angles = 2 * math.pi * torch.outer(torch.arange(order), torch.arange(order)).double() / order
        assert torch.allclose(matrix, math.sqrt(2) * (angles - math.pi / 4).cos(), atol=1e-11)
        return
    large, small = (math.sqrt(order / (order + 1)) * (sign + 1 / (math.sqrt(order + 1) + 1)) for sign in (1, -1))
    plus = (matrix - large).abs() < 1e-12
    assert bool((plus | ((matrix - small).abs() < 1e-12)).all())
    assert bool((plus.sum(1) == (order + 1) // 2).all())  # rows of the core sum to 1


def test_three_by_hand() -> None:
    expected = torch.tensor([[2.0, -1, 2], [-1, 2, 2], [2, 2, -1]]).double() / math.sqrt(3)
    assert torch.allclose(dense_factor(3), expected)


def test_tables_do_not_depend_on_the_last_bits_of_sines() -> None:
    """No entry lies near the middle of two floats: an error of 1e-15 rounds it to the same one."""
    for order in ODD:
        for off in (-1e-15, 1e-15):
            assert torch.equal((dense_factor(order) + off).float(), dense_factor(order).float())


@pytest.mark.parametrize("order", [3, 6, 9, 10, 14, 18, 36, 44, 60, 63, 72, 126, 144, 204])
def test_fast_equals_dense(order: int) -> None:
    kernel = kernel_order(order)
    assert kernel is not None
    expected = torch.kron(dense_factor(kernel), sylvester(order // kernel))
    assert torch.allclose(transform_of(order), expected, atol=1e-11)
    assert torch.allclose(transform_of(order, transposed=True), expected.T, atol=1e-11)
    assert torch.allclose(expected @ expected.T, order * torch.eye(order, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("order", [9, 36, 72, 43])
def test_sums_are_rounded_one_by_one(order: int) -> None:
    """Decoding in float32, written out: butterflies, then product, sum, product, sum in the order of columns."""
    kernel = kernel_order(order)
    assert kernel is not None
    values = splitmix64(order, order).bitwise_right_shift(40).float().numpy() * 2.0**-23
    part = values.reshape(kernel, -1).copy()
    half = 1
    while half < part.shape[1]:
        pairs = part.reshape(-1, 2, half)
        part = torch.from_numpy(pairs).unbind(1)
        part = torch.stack([part[0] + part[1], part[0] - part[1]], 1).numpy().reshape(kernel, -1)
        half *= 2
    table = dense_factor(kernel).float().numpy().T
    sums = part[:1].repeat(kernel, 0) * 0
    for j in range(kernel):
        for i in range(kernel):
            sums[i] = sums[i] + table[i, j] * part[j]
    found = hadamard_transform(torch.from_numpy(values), order, transposed=True)
    assert torch.equal(found, torch.from_numpy(sums.reshape(-1)) * (1 / math.sqrt(order)))


GOLDEN = {
    1: "fc378c9dc4de3229", 2: "68bcdcf14bb23a43", 8: "d5acaa8446859612", 64: "cb53f62366396b24",
    256: "fccfdaca4017cba9", 12: "2548d4e3183b5ee2", 24: "59823c18d33f4361", 192: "84484b71e4882d08",
    768: "ecc670ea939abe59", 20: "9be4c0c9e4769ec6", 40: "40c6d2243eb655b5", 320: "1a6f7fc44e3fb20f",
    28: "9c9f3c0298e09cea", 56: "3dfa5a2059622a41", 896: "5b25a798cea6bd86",
}  # fmt: skip


@pytest.mark.parametrize("order", sorted(GOLDEN))
def test_hadamard_orders_decode_to_the_bits_they_always_had(order: int) -> None:
    weight = splitmix64(order, 8 * order).bitwise_right_shift(40).float().view(4, 2 * order) * 2.0**-23
    decoded = Hadamard(Dense(weight), order, 7).decode()
    assert hashlib.sha256(decoded.numpy().tobytes()).hexdigest()[:16] == GOLDEN[order]


def test_orders_for_widths() -> None:
    for columns in (576, 960, 1536, 2304, 896, 4864, 8960, 11008, 13824, 18944, 72, 63, 1):
        assert largest_order(columns) == columns
    assert (largest_order(29568), largest_order(67), largest_order(130)) == (4224, 1, 26)
    assert (nearest_order(100, 576), nearest_order(700, 576), nearest_order(3, 64)) == (96, 576, 2)
    assert divides(576, 576)
    assert not divides(64, 96)
    assert not divides(65, 130)
