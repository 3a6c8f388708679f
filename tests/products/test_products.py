"""Products of all layouts against exact arithmetic, for every instruction set and number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operand_samples import (
    codebook,
    codes,
    dense,
    instruction_set,
    isas,
    magnitude,
    memory_of,
    needs_native,
    numbers,
    product,
    product_int8,
    sherry,
    trit_codes,
    trits,
    uniform,
    uniform_codes,
    with_offsets,
)
from torch import Tensor

from featherweight.model.products import pack_code, reference
from featherweight.model.products import structs as c
from featherweight.storage.codes import Code
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

pytestmark = needs_native

EVERY_LAYOUT = [
    *[trits(37, 300, planes, size) for planes in (1, 2, 3) for size in (20, 32, 100, 128)],
    *[trits(37, 300, planes, 64, tied=True) for planes in (1, 2, 3)],
    trits(37, 300, 2, 32, tied=True, weights=(3, 2), scale_dtype="log8"),
    *[uniform(37, 300, bits, 64, symmetric=bits % 2 == 0) for bits in range(1, 9)],
    *[with_offsets(37, 300, bits, size) for bits, size in ((2, 16), (3, 32), (4, 32), (5, 32), (8, 100), (4, 300))],
    *[codebook(37, 300, bits, None) for bits in (1, 2, 3, 4, 8)],
    *[dense(37, 300, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    *[sherry(37, 300, 64, stride) for stride in (1, 16)],
]
IDS = [f"{i}-{code.kind}" for i, code in enumerate(EVERY_LAYOUT)]
CHOICES = {"trit-planes": ("fields", "trits"), "sherry": ("auto", "fields")}


def layouts_of(code: Code) -> tuple[str, ...]:
    return CHOICES.get(code.kind, ("auto",))


@given(code=codes, tokens=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_float_products_are_those_of_the_decoded_matrix(code: Code, tokens: int, seed: int) -> None:
    x = numbers(tokens, code.shape[1], seed=seed)
    exact = x.double() @ code.decode().double().T
    for layout in layouts_of(code):
        found = product(memory_of(pack_code(code, layout=layout, threads=1)), x)
        assert bool(((found.double() - exact).abs() <= 1e-5 * magnitude(code, x) + 1e-30).all())


@given(code=st.one_of(trit_codes(), uniform_codes()), tokens=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_integer_products_are_those_of_the_rounded_input(code: Code, tokens: int, seed: int) -> None:
    x = numbers(tokens, code.shape[1], seed=seed)
    for layout in layouts_of(code):
        memory = memory_of(pack_code(code, layout=layout, threads=1))
        rounded, scales, _ = reference.quantize(x, int(c.header_of(memory).segment))
        exact = reference.matmul_int8(rounded, scales, memory)
        bound = 1e-5 * magnitude(code, x) + 1e-30
        assert bool(((product(memory, x, "int8").double() - exact).abs() <= bound).all())
        assert bool(((product_int8(memory, rounded, scales).double() - exact).abs() <= bound).all())


@given(code=st.one_of(trit_codes(), uniform_codes()), tokens=st.integers(1, 17), data=st.data())
@settings(max_examples=100, deadline=None)
def test_integer_parts_are_exact(code: Code, tokens: int, data: st.DataObject) -> None:
    """With all scales 1 every sum is an integer below 2^24, and the result is that integer."""
    ones = torch.ones_like(code.scales)
    if isinstance(code, TritPlanes):
        code = TritPlanes(code.trits, ones, code.shape, code.group_size, code.tied, code.packing, "float", code.weights)
    else:
        assert isinstance(code, Uniform)
        whole = None if code.offsets is None else code.offsets.float().clamp(-9, 9).round().to(ones.dtype)
        shape, bits, size = code.shape, code.bits, code.group_size
        code = Uniform(code.codes, ones, code.zero_points, shape, bits, size, offsets=whole)
    fill = data.draw(st.sampled_from((None, 127, -128, 1)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randint(-128, 128, (tokens, code.shape[1]), generator=g).to(torch.int8)
    if fill is not None:
        x.fill_(fill)
    expected = x.numpy().astype(np.int64) @ code.decode().numpy().astype(np.int64).T
    for layout in layouts_of(code):
        memory = memory_of(pack_code(code, layout=layout, threads=1))
        scales = torch.ones(tokens, int(c.header_of(memory).segments))
        assert np.array_equal(product_int8(memory, x, scales).numpy().astype(np.int64), expected)


def extreme(bits: int, columns: int, top: bool, zero: int | None) -> Uniform:
    """All codes the largest or the least, one scale 1 a row."""
    values = torch.full((17, columns), (1 << bits) - 1 if top else 0)
    zeros = None if zero is None else torch.full((17, 1), zero)
    return Uniform.encode(values, torch.ones(17, 1), zeros, bits, columns)


@pytest.mark.parametrize("columns", [65536, 65533])
@pytest.mark.parametrize("isa", isas())
def test_long_segments_do_not_overflow(columns: int, isa: str) -> None:
    """One segment of 65536 columns: sums reach 255 * 128 * 65536, just below 2^31, and round once to float32."""
    samples: list[tuple[Code, int]] = [
        (extreme(8, columns, True, 0), 255),
        (extreme(8, columns, False, 255), -255),
        (extreme(8, columns, True, None), 127),
        (extreme(8, columns, False, None), -128),
        (extreme(7, columns, True, 0), 127),
        (extreme(4, columns, True, 0), 15),
    ]
    for planes, weights in ((1, None), (2, (27, 27)), (3, None)):
        digits = torch.ones(planes, 17, columns, dtype=torch.int8)
        code = TritPlanes.encode(digits, torch.ones(17, 1), columns, tied=True, weights=weights)
        samples.append((code, sum(code.plane_weights)))
    with instruction_set(isa):
        for code, level in samples:
            for layout in layouts_of(code):
                memory = memory_of(pack_code(code, layout=layout, segment=columns, threads=1))
                assert c.header_of(memory).segments == 1
                for fill in (127, -128):
                    for tokens in (1, 6):
                        x = torch.full((tokens, columns), fill, dtype=torch.int8)
                        found = product_int8(memory, x, torch.ones(tokens, 1), threads=2)
                        exact = np.float32(np.int64(level) * fill * columns)
                        assert bool((found.numpy() == exact).all()), (code.spec, layout, fill, tokens)


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 300), st.integers(1000, 2500)),
    tokens=st.one_of(st.integers(1, 20), st.integers(30, 60)),
    isa=st.sampled_from(isas() or ["baseline"]),
)
@settings(max_examples=60, deadline=None)
def test_products_with_plain_matrices(dtype: torch.dtype, rows: int, columns: int, tokens: int, isa: str) -> None:
    code, x = dense(rows, columns, dtype), numbers(tokens, columns, seed=columns)
    memory, rounded = memory_of(pack_code(code)), x.bfloat16().float() if dtype == torch.bfloat16 else x
    assert torch.equal(reference.decode_operand(memory), code.decode())
    with instruction_set(isa):
        for precision, inputs in (("float", x), ("int8", rounded)):
            exact = inputs.double() @ code.decode().double().T
            bound = 1e-5 * magnitude(code, inputs) + 1e-30
            assert bool(((product(memory, x, precision).double() - exact).abs() <= bound).all()), precision
            assert torch.equal(reference.matmul(x, memory, precision), exact.float()), precision


@pytest.mark.parametrize("code", EVERY_LAYOUT, ids=IDS)
def test_results_depend_neither_on_instruction_set_nor_threads_nor_neighbours(code: Code) -> None:
    for layout in layouts_of(code):
        memory = memory_of(pack_code(code, layout=layout, threads=1))
        x = numbers(19, code.shape[1], seed=5)
        for precision in ("float", "int8"):
            with instruction_set("baseline"):
                expected = product(memory, x, precision)
            for isa in isas():
                with instruction_set(isa):
                    if code.kind == "dense":  # each multiplies in its own way; that it does so rightly is tested above
                        expected = product(memory, x, precision)
                    for threads in (1, 2, 5):
                        assert torch.equal(product(memory, x, precision, threads), expected), (isa, threads, precision)
                    for tokens in (1, 2, 3, 5, 16):
                        part = product(memory, x[:tokens], precision)
                        assert torch.equal(part, expected[:tokens]), (isa, tokens, precision)


@pytest.mark.parametrize("code", EVERY_LAYOUT, ids=IDS)
def test_products_can_be_added_to_what_is_there(code: Code) -> None:
    memory = memory_of(pack_code(code))
    for tokens in (1, 7):
        x, before = numbers(tokens, code.shape[1]), numbers(tokens, code.shape[0], seed=3)
        for precision in ("float", "int8"):
            total = product(memory, x, precision, onto=before)
            assert torch.equal(total, before + product(memory, x, precision))


@pytest.mark.parametrize("code", EVERY_LAYOUT, ids=IDS)
def test_rows_of_inputs_may_be_apart(code: Code) -> None:
    memory, wide = memory_of(pack_code(code)), numbers(5, code.shape[1] + 11)
    x = wide[:, 3 : 3 + code.shape[1]]
    assert torch.equal(product(memory, x), product(memory, x.contiguous()))


def poisoned(value: float) -> Tensor:
    x = numbers(2, 300)
    x[1, 200] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_what_is_not_a_number_stays_visible(value: float, precision: str) -> None:
    code = uniform(20, 300, 4, 64)
    found = product(memory_of(pack_code(code)), poisoned(value), precision)
    assert bool(torch.isfinite(found[0]).all())
    assert not bool(torch.isfinite(found[1]).any())
