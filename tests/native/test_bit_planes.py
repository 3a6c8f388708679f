"""Bit planes of small integers: the product is exact, the packed layout round-trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.native.bit_planes import (
    bit_plane_product,
    bit_planes,
    from_bit_planes,
    grouped_product,
    pack_bit_planes,
    plane_weight,
    unpack_bit_planes,
)


def integers(bits: int, *shape: int, seed: int = 0) -> Tensor:
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[0] = -(1 << (bits - 1))
    return values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 150), st.integers(0, 1000))
def test_product_is_exact_for_any_pair_of_widths(weight_bits: int, input_bits: int, columns: int, seed: int) -> None:
    weight, inputs = integers(weight_bits, 5, columns, seed=seed), integers(input_bits, 3, columns, seed=seed + 1)
    assert torch.equal(bit_plane_product(weight, inputs, weight_bits, input_bits), inputs @ weight.T)


def test_both_sign_planes_count_positive() -> None:
    lowest = torch.tensor([[-32]])
    assert bit_plane_product(lowest, torch.tensor([[-128]]), 6, 8).item() == 4096
    assert [plane_weight(p, 4) for p in range(4)] == [1, 2, 4, -8]


def test_planes_round_trip_and_refuse_what_does_not_fit() -> None:
    for bits in (2, 6, 8):
        values = integers(bits, 4, 9)
        assert torch.equal(from_bit_planes(bit_planes(values, bits)), values)
        with pytest.raises(ValueError, match="do not fit"):
            bit_planes(torch.tensor([1 << (bits - 1)]), bits)


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (5, 128), (13, 200), (1, 1), (16, 384)])
@pytest.mark.parametrize("bits", [6, 8])
def test_packed_layout_round_trips(rows: int, columns: int, bits: int) -> None:
    values = integers(bits, rows, columns)
    packed = pack_bit_planes(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (-(-columns // 128), -(-rows // 8), bits, 8, 4)
    assert torch.equal(unpack_bit_planes(packed, rows, columns), values)


def test_first_column_is_the_highest_bit_of_the_first_word() -> None:
    values = torch.zeros(9, 160, dtype=torch.int64)
    values[8, 128] = 4  # second chunk of rows, second slice of columns, plane 2
    packed = pack_bit_planes(values, 6)
    assert packed.nonzero().tolist() == [[1, 1, 2, 0, 0]]
    assert int(packed[1, 1, 2, 0, 0]) == -(1 << 31)


def test_grouped_product_agrees_with_dequantised_operands() -> None:
    weight, inputs = integers(6, 20, 384), integers(8, 7, 384, seed=1)
    weight_scales = torch.rand(20, 3).half() * 1e-4  # products of scales below the range of float16
    input_scales = torch.rand(7, 3) * 1e-4
    spread = [t.double().repeat_interleave(128, 1) for t in (weight_scales, input_scales)]
    expected = (inputs * spread[1]) @ (weight * spread[0]).T
    found = grouped_product(weight, weight_scales, inputs, input_scales, 6, 8)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
