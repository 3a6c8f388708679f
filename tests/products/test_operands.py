"""Packed operands hold the code's numbers exactly, and damaged ones are refused."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from operand_samples import (
    codebook,
    codes,
    dense,
    instruction_set,
    isas,
    memory_of,
    needs_native,
    rows_of,
    sherry,
    trits,
    uniform,
    with_offsets,
)

from featherweight.model.products import pack_code, pack_dense, reference
from featherweight.model.products import structs as c
from featherweight.storage.codes import Code
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

pytestmark = needs_native


def holds(code: Code, found: torch.Tensor) -> bool:
    """Equal, but for log8 and float32 scales of tied planes, whose multiples round where they are formed."""
    expected = code.decode()
    if isinstance(code, TritPlanes) and code.tied and code.scales.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=0, atol=1e-6 * float(code.scales.max()) * sum(code.plane_weights))
    return torch.equal(found, expected)


@given(code=codes)
@settings(max_examples=150, deadline=None)
def test_every_code_is_in_its_operand(code: Code) -> None:
    packed = pack_code(code, threads=1)
    memory = memory_of(packed)
    assert memory.data_ptr() % c.ALIGNMENT == 0
    assert packed.nbytes == memory.numel() == c.header_of(memory).bytes
    assert 0 < packed.weight_bytes <= packed.nbytes
    assert holds(code, reference.decode_operand(memory))
    assert holds(code, rows_of(memory, 0, code.shape[0]))
    middle = code.shape[0] // 2
    assert torch.equal(rows_of(memory, middle, code.shape[0]), rows_of(memory, 0, code.shape[0])[middle:])


LAYOUTS = [
    (trits(21, 333, 1, 64), ("fields", "trits")),
    (trits(21, 333, 2, 128), ("fields", "trits")),
    (trits(21, 333, 3, 100), ("fields", "trits")),
    (trits(21, 333, 2, 32, tied=True, weights=(3, 2), scale_dtype="log8"), ("fields", "trits")),
    (trits(21, 333, 2, 20, tied=True), ("fields", "trits")),
    (trits(21, 333, 1, 128, tied=True, weights=(2,)), ("fields", "trits")),
    (uniform(21, 333, 5, 64, symmetric=False), ("fields",)),
    (with_offsets(21, 333, 5, 32), ("fields",)),
    (codebook(21, 333, 4, 64), ("tables",)),
    (dense(21, 333), ("plain",)),
    (sherry(21, 333, 64, 16), ("fields", "quartets")),
    (sherry(21, 333, 20, 16), ("fields",)),
]


@pytest.mark.parametrize(("code", "names"), LAYOUTS, ids=[f"{i}-{code.kind}" for i, (code, _) in enumerate(LAYOUTS)])
def test_layouts_can_be_chosen(code: Code, names: tuple[str, ...]) -> None:
    for name in names:
        packed = pack_code(code, layout=name)
        assert packed.layouts == (name,)
        assert holds(code, reference.decode_operand(memory_of(packed)))
        assert holds(code, rows_of(memory_of(packed), 0, code.shape[0]))
    for name in {"fields", "trits", "tables", "plain", "quartets"} - set(names):
        with pytest.raises(ValueError, match="no layout"):
            pack_code(code, layout=name)
    with pytest.raises(ValueError, match="expected one of auto, fields"):
        pack_code(code, layout="best")


@pytest.mark.parametrize("threads", [2, 5])
def test_bytes_do_not_depend_on_threads_or_instruction_sets(threads: int) -> None:
    zeros, offsets = uniform(70, 200, 3, 64, symmetric=False), with_offsets(70, 200)
    for code in (trits(70, 200), zeros, offsets, codebook(70, 200), dense(70, 200)):
        layout = pack_code(code).layouts[0]
        expected = memory_of(pack_code(code, layout=layout, threads=1))
        assert torch.equal(memory_of(pack_code(code, layout=layout, threads=threads)), expected)
        for isa in isas():
            with instruction_set(isa):
                assert torch.equal(memory_of(pack_code(code, layout=layout, threads=1)), expected)


@pytest.mark.parametrize(
    "code",
    [trits(21, 333), uniform(21, 333, 3), with_offsets(21, 333), codebook(21, 333), dense(21, 333), sherry(21, 333)],
)
def test_damaged_operands_are_refused(code: Code) -> None:
    whole = memory_of(pack_code(code))
    c.check_operand(whole)
    size = ctypes.sizeof(c.Header)
    for count in (0, 8, size - 1, size, size + 64, whole.numel() - 1):
        with pytest.raises(ValueError, match="operand"):
            c.check_operand(c.aligned(count).copy_(whole[:count]))
    refused = 0
    for field, kind in c.Header._fields_:
        place = getattr(c.Header, field)
        for change in (1, 128):
            damaged = c.aligned(whole.numel()).copy_(whole)
            damaged[place.offset + place.size - 1] ^= change  # the top byte: a huge or negative number
            if c.needed().operand_check(damaged.data_ptr(), damaged.numel()) != 0:
                refused += 1
            elif kind is ctypes.c_int64:
                pytest.fail(f"an operand with a wrong {field} was taken")
    assert refused > len(c.Header._fields_)


def test_codes_that_mean_nothing_are_refused() -> None:
    code = trits(10, 100)
    bytes_ = code.trits.clone()
    bytes_[1, 7] = 250
    with pytest.raises(ValueError, match="not valid"):
        pack_code(TritPlanes(bytes_, code.scales, code.shape, code.group_size))


def test_what_has_no_layout_is_decoded_with_a_note() -> None:
    rows = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(0))
    by_rows = Uniform.encode(rows, torch.rand(3, 64), None, 4, 16, axis="output")
    packed = pack_code(by_rows)
    assert packed.layouts == ("plain",)
    assert packed.note == "uniform with groups of rows has no layout of its own: decoded to a dense matrix"
    assert torch.equal(reference.decode_operand(memory_of(packed)), by_rows.decode())
    assert pack_code(trits(10, 100)).note == ""


def test_dense_matrices_take_the_narrowest_exact_type() -> None:
    weight = torch.randn(30, 130, generator=torch.Generator().manual_seed(0))
    sizes = [
        pack_dense(w).nbytes for w in (weight, weight.bfloat16().float(), weight.half().float(), weight.bfloat16())
    ]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    for w in (weight, weight.half().float(), weight.bfloat16()):
        assert torch.equal(reference.decode_operand(memory_of(pack_dense(w))), w.float())
