"""What inputs go through before a product: gather, scale, rotate, round, quantise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operand_samples import address, instruction_set, isas, needs_native, numbers
from torch import Tensor

from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.products import reference
from featherweight.model.products import structs as c
from featherweight.model.products.ops import apply_step
from featherweight.model.products.pack import Step
from featherweight.native import library
from featherweight.storage.codes.hadamard import random_signs, rotate

pytestmark = needs_native


def quantize(x: Tensor, segment: int, rotation: Step | None = None, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    tokens, cols = x.shape
    segments = -(-cols // segment)
    codes = torch.empty(tokens, cols, dtype=torch.int8)
    scales, sums = torch.empty(tokens, segments), torch.empty(tokens, segments, dtype=torch.int32)
    struct = None if rotation is None else rotation.struct()
    status = c.needed().quantize(
        x.data_ptr(), tokens, cols, segment, None if struct is None else address(struct),
        codes.data_ptr(), scales.data_ptr(), sums.data_ptr(), threads,
    )  # fmt: skip
    assert status == library.OK
    return codes, scales, sums


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0))


floats = st.floats(width=32) | st.sampled_from(
    (0.0, -0.0, 1e-45, 1.2e-33, 3e38, math.inf, -math.inf, math.nan, 0.5, 127.0)
)


@given(values=st.lists(floats, min_size=1, max_size=70), segment=st.sampled_from((1, 4, 16, 20, 64)))
@settings(max_examples=200, deadline=None)
def test_quantised_inputs_follow_their_definition(values: list[float], segment: int) -> None:
    x = torch.tensor([values, [0.0] * len(values)])
    codes, scales, sums = quantize(x, segment)
    for first in range(0, len(values), segment):
        part, s = x[0, first : first + segment], first // segment
        found = codes[0, first : first + segment]
        assert int(sums[0, s]) == int(found.int().sum())
        if not bool(torch.isfinite(part).all()):
            assert bool(scales[0, s].isnan())
            assert not bool(found.any())
            continue
        largest = part.abs().max()
        if largest / 127 <= 1e-35:
            assert float(scales[0, s]) == 0.0
            assert not bool(found.any())
            continue
        assert scales[0, s] == largest / 127
        assert torch.equal(found.float(), (part * (127 / largest)).round().clamp(-127, 127))
        error = (found.double() * scales[0, s].double() - part.double()).abs().max()
        assert error <= 0.5001 * float(scales[0, s])
    assert not bool(codes[1].any() or scales[1].any() or sums[1].any())


@given(tokens=st.integers(1, 5), columns=st.integers(1, 300), segment=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_reference_quantises_alike(tokens: int, columns: int, segment: int, seed: int) -> None:
    x = numbers(tokens, columns, seed=seed) * 10 ** numbers(tokens, 1, seed=seed + 1)
    for found, expected in zip(quantize(x, segment), reference.quantize(x, segment), strict=True):
        assert torch.equal(found, expected)


def test_quantised_inputs_do_not_depend_on_threads_or_instruction_sets() -> None:
    x = numbers(7, 1000)
    x[3, 17], x[5, 500] = math.nan, math.inf
    expected = quantize(x, 100)
    for isa in isas():
        with instruction_set(isa):
            for threads in (1, 2, 5):
                assert all(same(a, b) for a, b in zip(quantize(x, 100, None, threads), expected, strict=True))


HADAMARD = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 12, 24, 48, 20, 40, 160, 28, 56, 448]
BLOCKS = [*HADAMARD, 3, 7, 10, 14, 9, 72, 576, 63, 816]


@pytest.mark.parametrize("block", BLOCKS)
def test_rotations_are_those_of_the_code(block: int) -> None:
    columns = block * (3 if block < 1024 else 2)
    x = numbers(5, columns)
    signs = random_signs(7, columns).float()
    found = apply_step(Step("hadamard", signs, block=block), x)
    expected = rotate(x.double(), block, 7)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6 * float(x.norm(dim=1).max()))
    for isa in isas():
        with instruction_set(isa):
            assert torch.equal(apply_step(Step("hadamard", signs, block=block), x), found)


@pytest.mark.parametrize("block", [*range(1, 64, 2), 12, 20, 28, 72, 96, 576, 688])
def test_rotations_have_the_bits_of_pytorch(block: int) -> None:
    """The dense factors are two programs' tables of the same floats, and both add in the order of the format."""
    x = numbers(5, 2 * block)
    assert torch.equal(apply_step(Step("hadamard", block=block), x), reference.hadamard(x, block, None))


FUSED = [(64, 64), (128, 32), (16, 128), (20, 20), (56, 16), (35, 70), (2240, 64)]


@pytest.mark.parametrize(("block", "segment"), FUSED)
def test_rotation_and_rounding_in_one_pass(block: int, segment: int) -> None:
    columns = 4480
    x, step = numbers(6, columns), Step("hadamard", random_signs(3, columns).float(), block=block)
    expected = quantize(apply_step(step, x), segment)
    for isa in isas():
        with instruction_set(isa):
            for threads in (1, 2, 5):
                assert all(
                    torch.equal(a, b) for a, b in zip(quantize(x, segment, step, threads), expected, strict=True)
                )


@given(tokens=st.integers(1, 5), columns=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gathering_and_scaling_are_exact(tokens: int, columns: int, seed: int) -> None:
    x = numbers(tokens, columns, seed=seed)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    assert torch.equal(apply_step(Step("permute", order), x), x[:, order.long()])
    factors = numbers(columns, seed=seed + 1)
    assert torch.equal(apply_step(Step("scale", factors), x), x * factors)


@given(
    columns=st.integers(1, 200),
    group=st.sampled_from((1, 16, 32, 100, 128, 1000)),
    bits=st.integers(2, 16),
    size=st.sampled_from((1e-8, 1e-3, 1.0, 1e5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rounded_inputs_are_those_of_the_rule(columns: int, group: int, bits: int, size: float, seed: int) -> None:
    x = numbers(3, columns, seed=seed) * size
    expected = quantized_inputs(x, bits, group)
    assert torch.equal(apply_step(Step("round", block=group, bits=bits), x), expected)
    assert torch.equal(reference.rounded(x, bits, group), expected)
