"""Kinds of code, one by one: the bytes and values that docs/format.md specifies, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from code_samples import numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.storage.codes import code_from, code_layout
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms, values_of_shifts
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import (
    Hadamard,
    hadamard_transform,
    random_signs,
    rotate,
    rotate_back,
    splitmix64,
)
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted, inverse_order
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.uniform import Uniform


def test_splitmix64_gives_its_published_sequence() -> None:
    outputs = [int(value) & (1 << 64) - 1 for value in splitmix64(0, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    outputs = [int(value) & (1 << 64) - 1 for value in splitmix64(1234567, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_signs_are_the_top_bits() -> None:
    assert random_signs(0, 3).tolist() == [-1, 1, 1]
    assert random_signs(1234567, 3).tolist() == [1, 1, -1]
    assert random_signs(0, 1000)[:3].tolist() == [-1, 1, 1]  # sign j does not depend on the width
    assert abs(float(random_signs(5, 100_000).float().mean())) < 0.02


def test_hadamard_by_hand() -> None:
    inner = Dense(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    # H of order 2 on (1, 2) and (3, 5), over sqrt 2, then the signs of seed 0: -1, 1, 1 and that of the fourth
    fourth = int(random_signs(0, 4)[3])
    expected = torch.tensor([[-3.0, -1.0, 8.0, -2.0 * fourth]]) / math.sqrt(2)
    assert torch.allclose(Hadamard(inner, 2, 0).decode(), expected, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 8, 12, 24, 20, 40, 28, 56, 128])
def test_hadamard_matrices(order: int) -> None:
    """Rows of +-1, orthogonal; transform and transposed transform are those of one matrix."""
    unit = torch.eye(order, dtype=torch.float64)
    matrix = hadamard_transform(unit, order).T * math.sqrt(order)
    assert torch.allclose(matrix.abs(), torch.ones_like(matrix))
    assert torch.allclose(matrix @ matrix.T, order * unit, atol=1e-12)
    assert torch.allclose(hadamard_transform(unit, order, transposed=True) * math.sqrt(order), matrix, atol=1e-12)
    if order & (order - 1) == 0:
        parity = [[(i & j).bit_count() % 2 for j in range(order)] for i in range(order)]
        assert torch.allclose(matrix, 1 - 2 * torch.tensor(parity, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 9, 12, 16, 20, 28, 63]), *[st.integers(1, 4)] * 2, st.integers(0, (1 << 53) - 1))
def test_rotations_are_orthogonal(block: int, blocks: int, rows: int, seed: int) -> None:
    x = numbers(rows, block * blocks).double()
    turned = rotate(x, block, seed)
    assert torch.allclose(rotate_back(turned, block, seed), x, atol=1e-13)
    assert torch.allclose(turned @ turned.T, x @ x.T, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 8, 12])
def test_rotations_are_differentiable(block: int) -> None:
    x = numbers(3, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: rotate(v, block, 5), x)
    assert torch.autograd.gradcheck(lambda v: rotate_back(v, block, 5), x)


def test_rotations_of_many_runs_and_strides_agree() -> None:
    x = numbers(300, 1024)  # more than are transformed together
    turned = rotate(x, 512, 9)
    assert torch.equal(turned[117:119], rotate(x[117:119], 512, 9))
    assert torch.equal(rotate(x.T.contiguous().T, 512, 9), turned)
    assert torch.equal(rotate(x.view(3, 100, 1024), 512, 9), turned.view(3, 100, 1024))
    assert rotate(x[:0], 512, 9).shape == (0, 1024)
    one = numbers(1, 512)
    before = one.clone()
    hadamard_transform(one, 512)
    assert torch.equal(one, before)  # what is given stays as it is


def test_column_scales_by_hand() -> None:
    inner = Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    code = ColumnScaled(inner, torch.tensor([0.5, -2.0], dtype=torch.float16))
    assert code.decode().tolist() == [[0.5, -4.0], [1.5, -8.0]]
    assert code.nbytes == 4 * 4 + 2 * 2


def test_permuted_by_hand() -> None:
    matrix = torch.tensor([[10.0, 11.0, 12.0]])
    order = torch.tensor([2, 0, 1])
    code = Permuted.encode(Dense(matrix[:, order]), order)
    assert code.decode().tolist() == matrix.tolist()
    assert code.order.dtype == torch.int16
    assert code.nbytes == 3 * 4 + 3 * 2
    assert inverse_order(order).tolist() == [1, 2, 0]
    wide = {"kind": "permuted", "shape": [1, 32769], "inner": {"kind": "dense"}}
    assert code_layout(wide)["order"].dtype == torch.int32


def test_sum_adds_in_order() -> None:
    terms = [Dense(torch.tensor([[value]])) for value in (1e8, 1.0, -1e8)]
    assert Sum(tuple(terms)).decode().tolist() == [[0.0]]  # (1e8 + 1) - 1e8 in float32


def test_low_rank_by_hand() -> None:
    left, right = torch.tensor([[127.0, 0.0], [-254.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    code = LowRank.encode(left, right, torch.int8)
    assert code.left.tolist() == [[127, 0], [-127, 0]]  # the second row in steps of 2
    assert code.right.tolist() == [[127, 64], [0, 0]]
    assert code.left_scales is not None
    assert code.left_scales.tolist() == [1.0, 2.0]
    assert code.nbytes == 4 + 4 + 2 * 2 + 2 * 2
    assert torch.allclose(code.decode(), left @ right, rtol=1e-2)
    assert LowRank.encode(left, right).nbytes == 2 * 8


def test_sparse_by_hand() -> None:
    matrix = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, 8.0]])
    code = Sparse.encode(matrix, matrix != 0)
    assert code.row_pointers.tolist() == [0, 1, 1, 3]
    assert code.columns.tolist() == [1, 0, 2]
    assert code.values.tolist() == [5.0, 7.0, 8.0]
    assert code.decode().tolist() == matrix.tolist()
    assert code.nbytes == 4 * 4 + 3 * 2 + 3 * 2


def test_masked_by_hand() -> None:
    matrix = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, -3.5]])
    code = Masked.encode(matrix, matrix != 0)
    assert code.mask.tolist() == [0b01000010, 0b1]
    assert code.tensors()["values"].tolist() == [5.0, 7.0, -3.5]
    assert code.decode().tolist() == matrix.tolist()
    assert code.nbytes == 2 + 3 * 2
    rows = code.in_rows()
    assert (rows.row_pointers.tolist(), rows.columns.tolist()) == ([0, 1, 1, 3], [1, 0, 2])
    rounded = Masked.encode(matrix, matrix != 0, bits=4, scale_dtype=torch.float32)
    assert rounded.tensors()["scales"].tolist() == pytest.approx([5 / 7, 0.0, 1.0])
    assert rounded.tensors()["codes"].tolist() == [15 | 15 << 4, 4]  # 7 + 8, 7 + 8, halves to even: -4 + 8
    assert rounded.decode()[2].tolist() == [7.0, 0.0, -4.0]
    assert torch.equal(rounded.in_rows().decode(), rounded.decode())


def test_a_mask_that_does_not_fit_is_refused() -> None:
    code = Masked.encode(torch.ones(3, 3), torch.eye(3).bool())
    stored = code.tensors()
    for mask, message in (([0b00010001, 0b11], "behind the last"), ([0b00010001, 0], "2 bits set, and there are 3")):
        with pytest.raises(ValueError, match=message):
            code_from(code.spec, {**stored, "mask": torch.tensor(mask, dtype=torch.uint8)})


def test_codebook_by_hand() -> None:
    codes = torch.tensor([[0, 3, 1, 2, 2]])
    code = Codebook.encode(codes, torch.tensor([[[-4.0, -1.0, 1.0, 4.0], [-8.0, 0.0, 2.0, 3.0]]]), group_size=3)
    assert code.codes.tolist() == [0 | 3 << 2 | 1 << 4 | 2 << 6, 2]
    assert code.decode().tolist() == [[-4.0, 4.0, -1.0, 2.0, 2.0]]
    assert code.nbytes == 2 + 2 * 8


def test_binary_planes_by_hand() -> None:
    planes = torch.tensor([[[1, -1, 1]], [[1, 1, -1]]])
    code = BinaryPlanes.encode(planes, torch.tensor([[[2.0, 0.5], [4.0, 1.0]]]), group_size=2)
    assert code.signs.tolist() == [[0b101], [0b011]]
    assert code.decode().tolist() == [[2.5, -1.5, 3.0]]
    assert code.nbytes == 2 + 4 * 2


def test_shifts_by_hand() -> None:
    shifts = torch.tensor([[[[65, -62, 0]]]], dtype=torch.int8)  # 2 - 1/4
    code = BinaryPlanes.encode_shifts(torch.tensor([[[1, -1], [-1, -1]]]), shifts, 2, rows_per_scale=None)
    assert code.decode().tolist() == [[1.75, -1.75], [-1.75, -1.75]]
    assert code.nbytes == 1 + 3
    assert values_of_shifts(shifts, exponent_bias=60).tolist() == [[[28.0]]]


def test_offset_trits_by_hand() -> None:
    trits = torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8)
    scales, offsets = torch.tensor([[2.0, 4.0], [1.0, 8.0]]), torch.tensor([[0.5, -1.0], [0.25, 0.0]])
    code = OffsetTrits.encode(trits, scales, offsets, group_size=2)
    assert code.trits.tolist() == [2 + 3 * 1 + 9 * 0 + 27 * 1 + 81 * 2, 2]
    assert code.decode().tolist() == [[2.5, 0.5, -5.0], [0.25, 1.25, 8.0]]
    assert code.nbytes == 2 + 2 * 8


def test_uniform_in_groups_of_outputs_by_hand() -> None:
    codes = torch.tensor([[1, 3], [0, 2], [3, 3]])
    code = Uniform.encode(
        codes, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[1, 2], [0, 3]]), 2, 2, axis="output"
    )
    assert code.zero_points is not None
    assert code.zero_points.tolist() == [1 | 2 << 2 | 0 << 4 | 3 << 6]
    assert code.decode().tolist() == [[0.0, 2.0], [-1.0, 0.0], [12.0, 0.0]]
    assert code.spec["axis"] == "output"


def test_a_uniform_spec_without_axis_and_offsets_means_what_it_did() -> None:
    code = Uniform.encode(torch.zeros(2, 8), torch.ones(2, 2), None, 4, 4)
    assert not {"axis", "offsets"} & set(code.spec)
    assert code_layout(code.spec)["scales"].shape == (2, 2)
    assert set(code_layout({**code.spec, "offsets": False})) == {"codes", "scales"}


def test_uniform_with_offsets_by_hand() -> None:
    codes = torch.tensor([[1, 3, 0], [2, 2, 1]])
    scales, offsets = torch.tensor([[0.5, 4.0], [1.0, 8.0]]), torch.tensor([[-0.75, -1.0], [0.25, 0.0]])
    code = Uniform.encode(codes, scales, None, 2, 2, offsets=offsets)
    assert code.codes.tolist() == [1 | 3 << 2 | 0 << 4 | 2 << 6, 2 | 1 << 2]
    assert code.decode().tolist() == [[-0.25, 0.75, -1.0], [2.25, 2.25, 8.0]]
    assert code.nbytes == 2 + 2 * 8
    assert (code.spec["offsets"], code.spec["symmetric"], code.symmetric) == (True, False, False)
    assert code.group_levels(0, 0) == [-0.75, -0.25, 0.25, 0.75]
    below = Uniform.of_rows([code, code])
    assert torch.equal(below.decode(), code.decode().repeat(2, 1))
    for wrong in ({"zero_points": torch.zeros(2, 2)}, {"zero_points": None, "axis": "output"}):
        with pytest.raises(ValueError, match="offsets stand in the place of zero points"):
            Uniform.encode(codes, scales, bits=2, group_size=2, offsets=offsets, **wrong)  # type: ignore[arg-type]


def in_blocks(levels: int, blocks: int, size: int, dtype: type[np.floating[Any]]) -> tuple[np.ndarray, ...]:
    """q [blocks, size], d and m [blocks] as other tools have them, of any size: subnormal halves are among them."""
    drawn = np.random.default_rng(levels)
    d, m = (drawn.standard_normal(blocks) * 2.0 ** drawn.integers(-20, 6, blocks) for _ in range(2))
    return drawn.integers(0, levels, (blocks, size)), d.astype(dtype), m.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (5, 32), (2, 16), (8, 32)])
def test_blocks_of_other_tools_are_stored_exactly(bits: int, size: int, dtype: type[np.floating[Any]]) -> None:
    """GGUF's Q4_1, Q5_1 and their kin: w = d q + m of a block, in float32 first the product, then the sum."""
    rows, columns = 24, 160
    q, d, m = in_blocks(1 << bits, rows * columns // size, size, dtype)
    expected = (d.astype(np.float32)[:, None] * q.astype(np.float32) + m.astype(np.float32)[:, None]).reshape(rows, -1)
    groups = (rows, columns // size)
    code = Uniform.encode(
        torch.from_numpy(q.reshape(rows, columns)),
        torch.from_numpy(d.reshape(groups)),
        None,
        bits,
        size,
        scale_dtype=torch.from_numpy(d).dtype,
        offsets=torch.from_numpy(m.reshape(groups)),
    )
    assert code.decode().numpy().tobytes() == expected.tobytes()
    again = code_from(code.spec, code.tensors())
    assert again.decode().numpy().tobytes() == expected.tobytes()
    assert again.decode_rows(7, 13).numpy().tobytes() == expected[7:13].tobytes()


# Powers of two -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-9, 1e9), st.booleans(), st.integers(1, 4))
def test_the_error_of_t_powers_of_two(size: float, negative: bool, terms: int) -> None:
    """ShiftAddLLM: the relative error is at most (sqrt 2 - 1)^t."""
    value = -size if negative else size
    found = values_of_shifts(power_of_two_terms(torch.tensor([value], dtype=torch.float64), terms)).double()
    assert abs(float(found) - value) <= (math.sqrt(2) - 1) ** terms * size * (1 + 1e-6)


def test_powers_of_two_at_the_ends_of_the_range() -> None:
    assert power_of_two_terms(torch.tensor([0.0, 2.0**-70, 2.0**70, -1.0]), 1).squeeze(-1).tolist() == [0, 0, 127, -64]
    tight = power_of_two_terms(torch.tensor([math.sqrt(2) * 1.0000001]), 1)  # rounded up just above sqrt 2
    assert values_of_shifts(tight).tolist() == [2.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 17), st.integers(1, 4), st.integers(1, 4))
def test_byte_counts(rows: int, columns: int, size: int, bits: int, strip: int) -> None:
    groups, strips = -(-columns // size), -(-rows // strip)

    def nbytes(**spec: Any) -> int:
        return sum(entry.nbytes for entry in code_layout({"shape": [rows, columns], **spec}).values())

    plane = -(-rows * columns // 8)
    assert (
        nbytes(kind="codebook", bits=bits, group_size=size)
        == -(-rows * columns * bits // 8) + 2 * rows * groups * 2**bits
    )
    assert (
        nbytes(kind="codebook", bits=bits, codebook_dtype="float32")
        == -(-rows * columns * bits // 8) + 4 * rows * 2**bits
    )
    assert (
        nbytes(kind="binary-planes", planes=bits, group_size=size, rows_per_scale=strip)
        == bits * plane + 2 * strips * groups * bits
    )
    assert (
        nbytes(kind="binary-planes", planes=bits, group_size=size, rows_per_scale=None, shift_terms=3)
        == bits * plane + groups * bits * 3
    )
    assert nbytes(kind="offset-trits", group_size=size) == -(-rows * columns // 5) + 4 * rows * groups
    rank = min(bits, rows, columns)
    assert nbytes(kind="low-rank", rank=rank) == 2 * rank * (rows + columns)
    assert nbytes(kind="low-rank", rank=rank, factor_dtype="int8") == rank * (rows + columns) + 2 * (rows + rank)
    entries = min(bits, rows * columns)
    assert nbytes(kind="sparse", entries=entries) == 4 * (rows + 1) + 4 * entries
    assert nbytes(kind="masked", entries=entries) == plane + 2 * entries
    if bits > 1:
        stored = plane + -(-entries * bits // 8) + 2 * rows
        assert nbytes(kind="masked", entries=entries, bits=bits) == stored
    output_groups = -(-rows // size)
    assert nbytes(kind="uniform", bits=bits, group_size=size, axis="output") == -(
        -rows * columns * bits // 8
    ) + 2 * output_groups * columns + -(-output_groups * columns * bits // 8)
