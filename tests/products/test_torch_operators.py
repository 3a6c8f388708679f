"""`torch.ops.featherweight`: schemas, shape rules, tracing, and the reference without the native library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operand_samples import codebook, dense, memory_of, needs_native, numbers, sherry, trits, uniform
from torch import Tensor

from featherweight.model.products import pack_code, pack_linear, reference
from featherweight.model.products import structs as c
from featherweight.model.products.ops import MATMULS, SCHEMAS
from featherweight.native import library
from featherweight.storage.codes.hadamard import random_signs
from featherweight.storage.codes.sparse import Sparse

pytestmark = needs_native

OPS = torch.ops.featherweight
CODES = [trits(20, 160), uniform(20, 160, 3, 64, symmetric=False), codebook(20, 160), sherry(20, 160), dense(20, 160)]


def arguments(name: str) -> tuple[Any, ...]:
    x = numbers(2, 3, 160)
    for code in CODES:
        if MATMULS[code.kind] == name:
            return x, memory_of(pack_code(code)), 20, "float"
    if name == "low_rank_matmul":
        left, right = (memory_of(pack_code(code)) for code in (uniform(20, 5, 8, 5), uniform(5, 160, 8, 160)))
        return x, left, right, 20, "float"
    if name == "sparse_matmul":
        code = Sparse.encode(numbers(20, 160), numbers(20, 160, seed=1) > 1.5)
        return x, code.row_pointers, code.columns.int(), code.values.float(), 20
    signs = random_signs(0, 160).float()
    return (x, 32, signs) if name == "hadamard" else (x, 32, signs, 40)


def expected_of(name: str, given: tuple[Any, ...]) -> Any:
    if name in MATMULS.values():
        return reference.matmul(given[0], given[1], given[3])
    if name == "low_rank_matmul":
        return reference.low_rank_matmul(given[0], given[1], given[2], given[4])
    if name == "sparse_matmul":
        return reference.sparse_matmul(*given[:4])
    if name == "hadamard":
        return reference.hadamard(*given)
    return reference.quantize(reference.hadamard(*given[:3]), given[3])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_operator_is_sound(name: str) -> None:
    """Schema, shapes, tracing with symbolic sizes, and a clear refusal to be differentiated."""
    given = arguments(name)
    torch.library.opcheck(getattr(OPS, name).default, given)
    found, expected = getattr(OPS, name)(*given), expected_of(name, given)
    for a, b in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert a.dtype == b.dtype
        # sums in another order differ by some last bits of what is summed, however small what comes of them
        near = max(1e-4, 1e-6 * float(b.float().abs().max())) if a.is_floating_point() else 1.0
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=near)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    x, *rest = arguments(name)
    found = getattr(OPS, name)(x.to(dtype), *rest)
    fake = getattr(OPS, name)(x.to("meta", dtype), *(r.to("meta") if isinstance(r, Tensor) else r for r in rest))
    for a, b in zip(found, fake, strict=True) if isinstance(found, tuple) else [(found, fake)]:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert name == "hadamard_quantize" or found.dtype == dtype


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_tokens_give_no_results(name: str) -> None:
    x, *rest = arguments(name)
    found, some = getattr(OPS, name)(x[:0], *rest), getattr(OPS, name)(x, *rest)
    for a, b in zip(found, some, strict=True) if isinstance(found, tuple) else [(found, some)]:
        assert (a.dtype, a.shape) == (b.dtype, (0, *b.shape[1:]))


@pytest.mark.parametrize("name", SCHEMAS)
def test_without_the_native_library_the_reference_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(name)
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    found, expected = getattr(OPS, name)(*given), expected_of(name, given)
    for a, b in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert torch.equal(a, b)


def test_bad_arguments_are_refused() -> None:
    x, operand, _, _ = arguments("uniform_matmul")
    with pytest.raises(ValueError, match="precision is 'half'"):
        OPS.uniform_matmul(x, operand, 20, "half")
    with pytest.raises(ValueError, match=r"the operand is \[20, 160\]"):
        OPS.uniform_matmul(x, operand, 21, "float")
    with pytest.raises(ValueError, match=r"the operand is \[20, 160\]"):
        OPS.uniform_matmul(x[..., :-1], operand, 20, "float")
    with pytest.raises(ValueError, match="no operand"):
        OPS.uniform_matmul(x, operand[:-64], 20, "float")
    with pytest.raises(ValueError, match="uint8"):
        OPS.uniform_matmul(x, operand.float(), 20, "float")
    x, pointers, columns, values, rows = arguments("sparse_matmul")
    with pytest.raises(ValueError, match="outside"):
        OPS.sparse_matmul(x, pointers, columns + 160, values, rows)


@pytest.mark.parametrize("columns", [6, 36, 60, 130, 160])
@pytest.mark.parametrize("meta", [False, True])
def test_orders_that_there_are_not_are_refused(columns: int, meta: bool) -> None:
    """By the kernels and by the rules that tracing goes by; what divides the columns need not be an order."""
    x = torch.randn(2, columns, device="meta" if meta else "cpu")
    blocks = {6: [4, 5], 36: [8, 24, 72], 60: [8, 9, 45], 130: [65, 130], 160: [3, 64, 320, 0, -4]}
    for block in blocks[columns]:
        with pytest.raises(ValueError, match=f"block is {block}, expected"):
            OPS.hadamard(x, block, None)
        with pytest.raises(ValueError, match=f"block is {block}, expected"):
            OPS.hadamard_quantize(x, block, None, 4)
    with pytest.raises(ValueError, match="signs are"):
        OPS.hadamard(x, 2, torch.ones(columns - 1, device=x.device))
    with pytest.raises(ValueError, match="segment is 0"):
        OPS.hadamard_quantize(x, 2, None, 0)
    with pytest.raises(ValueError, match="inputs are floats"):
        OPS.hadamard(x.to(torch.int32), 2, None)


def test_orders_that_there_are_give_what_the_definition_does() -> None:
    for block in (1, 2, 12, 20, 24, 28, 56, 64, 3, 9, 10, 30, 36, 63, 576):
        x = numbers(3, 2 * block)
        assert torch.allclose(OPS.hadamard(x, block, None), reference.hadamard(x, block, None), atol=1e-5)


def test_damaged_sparse_matrices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, pointers, columns, values, rows = arguments("sparse_matmul")

    def changed(place: int, value: int) -> Tensor:
        damaged: Tensor = pointers.clone()
        damaged[place] = value
        return damaged

    entries = columns.numel()
    for native in (True, False):
        if not native:
            monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
        for damaged in (changed(0, -1), changed(0, 1), changed(20, entries + 10**6), changed(20, 0), changed(7, 2**30)):
            with pytest.raises(ValueError, match=f"do not rise from 0 to the number of entries, {entries}"):
                OPS.sparse_matmul(x, damaged, columns, values, rows)
        for wrong in (columns - 10**6, columns + 10**6):
            with pytest.raises(ValueError, match="outside of 0 to 159"):
                OPS.sparse_matmul(x, pointers, wrong, values, rows)
    shapes = [
        (pointers[:-1], columns, values, "row_pointers has 20 entries"),
        (pointers, columns[:-1], values, f"{entries - 1} columns for {entries} values"),
        (pointers.float(), columns, values, "row_pointers is int32"),
        (pointers, columns.bool(), values, "columns is int32"),
        (pointers, columns, values.int(), "values are floats"),
    ]
    for *given, message in shapes:
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=message):
                OPS.sparse_matmul(x.to(device), *(t.to(device) for t in given), rows)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operands_and_precisions_are_checked_while_tracing(device: str) -> None:
    x, operand, rows, _ = arguments("uniform_matmul")
    x, operand = x.to(device), operand.to(device)
    with pytest.raises(ValueError, match="an operand is uint8"):
        OPS.uniform_matmul(x, operand.float(), rows, "float")
    with pytest.raises(ValueError, match="precision is 'half'"):
        OPS.uniform_matmul(x, operand, rows, "half")
    with pytest.raises(ValueError, match="out_features is 0"):
        OPS.low_rank_matmul(x, operand, operand, 0, "float")
    with pytest.raises(ValueError, match="inputs are floats"):
        OPS.uniform_matmul(x.long(), operand, rows, "float")


def test_scale_exponents_below_normal_numbers_are_refused() -> None:
    """Kernels put one-byte scales together from their bits, which subnormal numbers are not made of."""
    code = trits(20, 160, scale_dtype="log8")
    tensors = code.tensors()
    for exponent in (-128, -113):
        damaged = tensors | {"scale_exponent": torch.tensor([exponent], dtype=torch.int8)}
        with pytest.raises(ValueError, match=f"scale_exponent is {exponent}, expected -112 to 127"):
            pack_linear(code.spec, damaged)
    least = pack_linear(code.spec, tensors | {"scale_exponent": torch.tensor([-112], dtype=torch.int8)})
    rows = least.weight_rows(range(20))
    assert rows is not None
    assert torch.equal(rows, reference.decode_operand(least.operands[0].memory))


def test_lengths_and_strides_are_checked_in_the_library() -> None:
    native = c.needed()
    packed = pack_code(uniform(20, 160, 3, 64))
    memory, x, out = packed.operands[0].memory, numbers(2, 160), torch.zeros(2, 20)

    def product(
        count: int = 320, tokens: int = 2, stride: int = 160, room: int = 40, step: int = 20, cut: int = 0
    ) -> int:
        return native.product(
            memory.data_ptr(), memory.numel() - cut, x.data_ptr(), count, tokens, stride, out.data_ptr(), room, step,
            1, 0, 1,
        )  # fmt: skip

    assert product() == library.OK
    for wrong in (
        {"count": 319},
        {"stride": 159},
        {"stride": -160},
        {"tokens": 3},
        {"tokens": -1},
        {"tokens": 2**62},
        {"room": 39},
        {"step": 19},
        {"cut": 64},
    ):
        assert product(**wrong) == library.INVALID, wrong


def test_operands_need_no_alignment() -> None:
    x, operand, rows, precision = arguments("dense_matmul")
    moved = torch.empty(operand.numel() + 3, dtype=torch.uint8)[3:].copy_(operand)
    assert torch.equal(OPS.dense_matmul(x, moved, rows, precision), OPS.dense_matmul(x, operand, rows, precision))
