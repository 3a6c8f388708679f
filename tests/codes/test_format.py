"""The bytes that docs/format.md specifies, worked out by hand: what is stored today must be readable for ever."""

from __future__ import annotations

import pytest
import torch

from featherweight.storage.codes import UnknownCodeError, code_from, code_layout
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform


def test_base3_bytes_run_over_row_ends() -> None:
    trits = torch.tensor([[[-1, 0, 1], [1, 1, -1]]], dtype=torch.int8)  # digits 0 1 2 2 2 | 0
    code = TritPlanes.encode(trits, torch.ones(2, 1, 1), group_size=3)
    assert code.trits.tolist() == [[0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 2, 0]]
    assert code.unpack().tolist() == trits.tolist()


def test_two_bit_bytes() -> None:
    trits = torch.tensor([[[-1, 0, 1], [1, 1, -1]]], dtype=torch.int8)  # digits 0 1 2 2 | 2 0
    code = TritPlanes.encode(trits, torch.ones(2, 1, 1), group_size=3, packing="2bit")
    assert code.trits.tolist() == [[0b10_10_01_00, 0b00_10]]


def test_free_scales_by_group_and_plane() -> None:
    trits = torch.tensor([[[1, -1, 0]], [[1, 1, -1]]], dtype=torch.int8)
    scales = torch.tensor([[[2.0, 0.5], [4.0, 0.25]]])  # groups of two: columns 0, 1 and the short one
    code = TritPlanes.encode(trits, scales, group_size=2)
    assert code.decode().tolist() == [[2.5, -1.5, -0.25]]
    assert code.nbytes == 2 * 1 + 4 * 2


def test_tied_scale_times_an_integer() -> None:
    trits = torch.tensor([[[1, -1]], [[0, 1]], [[-1, 1]]], dtype=torch.int8)  # 9 + 0 - 1, -9 + 3 + 1
    code = TritPlanes.encode(trits, torch.tensor([[0.5]]), group_size=2, tied=True)
    assert code.decode().tolist() == [[4.0, -2.5]]


def test_bit_strings_straddle_bytes() -> None:
    codes = torch.tensor([[1, 7, 2], [5, 0, 6]])  # 3 bits: 001 111 010 101 000 110, lowest bit first
    zero_points = torch.tensor([[3], [4]])
    code = Uniform.encode(codes, torch.tensor([[0.5], [2.0]]), zero_points, bits=3, group_size=3)
    value = sum(int(c) << (3 * i) for i, c in enumerate([1, 7, 2, 5, 0, 6]))
    assert code.codes.tolist() == [value & 255, value >> 8 & 255, value >> 16]
    assert code.zero_points is not None
    assert code.zero_points.tolist() == [3 | 4 << 3]
    assert code.decode().tolist() == [[-1.0, 2.0, -0.5], [2.0, -8.0, 4.0]]


@pytest.mark.parametrize(
    "change",
    [
        {"planes": 4},
        {"planes": True},
        {"group_size": 0},
        {"packing": "base4"},
        {"scale_dtype": "int8"},
        {"shape": [2]},
        {"shape": [2, -1]},
        {"shape": None},
    ],
    ids=str,
)
def test_a_wrong_spec_is_a_value_error(change: dict[str, object]) -> None:
    spec = {"kind": "trit-planes", "shape": [2, 8], "planes": 2, "tied": False, "group_size": 4, "packing": "base3"}
    code_layout(spec)
    with pytest.raises(ValueError, match=next(iter(change))):
        code_layout(spec | change)


def test_missing_and_misshapen_tensors_are_named() -> None:
    code = TritPlanes.encode(torch.zeros(2, 4, 8, dtype=torch.int8), torch.ones(4, 2, 2), group_size=4)
    with pytest.raises(ValueError, match="'scales'.*missing"):
        code_from(code.spec, {"trits": code.trits})
    with pytest.raises(ValueError, match="'scales'.*float16"):
        code_from(code.spec, {"trits": code.trits, "scales": code.scales.float()})
    with pytest.raises(ValueError, match="'trits'"):
        code_from(code.spec, {"trits": code.trits[:, 1:], "scales": code.scales})


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UnknownCodeError, match="did you mean 'trit-planes'"):
        code_layout({"kind": "trit-plane", "shape": [1, 1]})
