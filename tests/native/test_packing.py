"""Packed trits and bits: the formats, there and back, refusals, decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.native import library
from featherweight.native.packing import (
    decode_trit_planes,
    decode_trit_planes_reference,
    pack_bits,
    pack_trits,
    packed_bytes,
    unpack_bits,
    unpack_trits,
)

TRITS = st.lists(st.integers(-1, 1), max_size=70)
PACKINGS = ["base3", "2bit"]


@pytest.fixture(autouse=True, params=["native", "reference"])
def choice(request: pytest.FixtureRequest) -> object:
    """Every test with the native library and without."""
    patch = pytest.MonkeyPatch()
    if request.param == "reference":
        patch.setenv("FEATHERWEIGHT_NATIVE", "off")
    elif library.get() is None:
        pytest.skip("the native library is not built")
    yield request.param
    patch.undo()


@pytest.mark.parametrize("packing", PACKINGS)
class TestTrits:
    @given(trits=TRITS)
    def test_there_and_back(self, packing: str, trits: list[int]) -> None:
        tensor = torch.tensor(trits, dtype=torch.int8)
        packed = pack_trits(tensor, packing)
        assert packed.numel() == packed_bytes(len(trits), packing)
        assert unpack_trits(packed, len(trits), packing).tolist() == trits

    @given(trits=TRITS)
    def test_format(self, packing: str, trits: list[int]) -> None:
        per_byte, base = (5, 3) if packing == "base3" else (4, 4)
        parts = [trits[i : i + per_byte] for i in range(0, len(trits), per_byte)]
        expected = [sum((t + 1) * base**i for i, t in enumerate(part)) for part in parts]
        assert pack_trits(torch.tensor(trits, dtype=torch.int8), packing).tolist() == expected

    def test_every_byte(self, packing: str) -> None:
        for byte in range(256):
            packed = torch.full((3,), 0, dtype=torch.uint8)
            packed[1] = byte
            count = 15 if packing == "base3" else 12
            valid = byte < 243 if packing == "base3" else all(byte >> 2 * i & 3 != 3 for i in range(4))
            if valid:
                assert torch.equal(pack_trits(unpack_trits(packed, count, packing), packing), packed)
            else:
                with pytest.raises(ValueError, match="byte 1 "):
                    unpack_trits(packed, count, packing)

    def test_refusals(self, packing: str) -> None:
        with pytest.raises(ValueError, match="-1, 0 or 1"):
            pack_trits(torch.tensor([2], dtype=torch.int8), packing)
        with pytest.raises(ValueError, match="int8"):
            pack_trits(torch.tensor([1]), packing)
        with pytest.raises(ValueError, match="must be 2 bytes"):
            unpack_trits(torch.zeros(3, dtype=torch.uint8), 8, packing)
        with pytest.raises(ValueError, match="packing must be"):
            pack_trits(torch.zeros(3, dtype=torch.int8), "base4")


class TestBits:
    @given(data=st.data(), bits=st.integers(1, 8))
    def test_there_and_back(self, data: st.DataObject, bits: int) -> None:
        values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
        packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
        number = sum(value << (i * bits) for i, value in enumerate(values))
        assert bytes(packed.tolist()) == number.to_bytes(-(-len(values) * bits // 8), "little")
        assert unpack_bits(packed, len(values), bits).tolist() == values

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            pack_bits(torch.tensor([8], dtype=torch.uint8), 3)
        with pytest.raises(ValueError, match="between 1 and 8"):
            pack_bits(torch.tensor([1], dtype=torch.uint8), 9)
        with pytest.raises(ValueError, match="must be 2 bytes"):
            unpack_bits(torch.zeros(1, dtype=torch.uint8), 5, 3)


class TestDecode:
    @pytest.mark.parametrize("packing", PACKINGS)
    @pytest.mark.parametrize("planes", [1, 2, 3])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_equals_the_formula(self, packing: str, planes: int, tied: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(planes)
        n, d, size = 23, 77, 32
        trits = torch.randint(-1, 2, (planes, n, d), generator=generator, dtype=torch.int8)
        shape = (n, 3) if tied else (n, 3, planes)
        scales = torch.randn(shape, generator=generator).to(dtype)
        packed = torch.stack([pack_trits(plane, packing) for plane in trits])
        expected = torch.zeros(n, d)
        for row in range(n):
            for column in range(d):
                here = trits[:, row, column].to(torch.float32)
                scale = scales[row, column // size].to(torch.float32)
                if tied:
                    expected[row, column] = scale * sum(3 ** (planes - 1 - k) * here[k] for k in range(planes))
                else:
                    total = scale[0] * here[0]
                    for k in range(1, planes):
                        total = total + scale[k] * here[k]
                    expected[row, column] = total
        for threads in (1, 3):
            found = decode_trit_planes(packed, scales, (n, d), size, packing, threads=threads)
            assert torch.equal(found, expected)
        assert torch.equal(decode_trit_planes_reference(packed, scales, (n, d), size, packing), expected)

    def test_out_and_refusals(self) -> None:
        packed, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(4, 1, 2)
        out = torch.empty(4, 10)
        assert decode_trit_planes(packed, scales, (4, 10), 128, "base3", out=out) is out
        assert bool((out == -2).all())
        with pytest.raises(ValueError, match="scales"):
            decode_trit_planes(packed, scales, (4, 10), 5, "base3")
        with pytest.raises(ValueError, match="must be 10 bytes"):
            decode_trit_planes(packed, scales, (5, 10), 128, "base3")
        with pytest.raises(ValueError, match="out must be"):
            decode_trit_planes(packed, scales, (4, 10), 128, "base3", out=torch.empty(4, 9))
        packed[1, 3] = 250
        with pytest.raises(ValueError, match="not valid base3"):
            decode_trit_planes(packed, scales, (4, 10), 128, "base3")
