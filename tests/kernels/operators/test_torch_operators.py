"""`torch.ops.featherweight`: schemas, shape rules, tracing, and the reference without the native library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operand_samples import codebook, dense, memory_of, needs_native, numbers, sherry, trits, uniform
from torch import Tensor

from featherweight.codes.hadamard import random_signs
from featherweight.codes.sparse import Sparse
from featherweight.kernels.operators import pack_code, reference
from featherweight.kernels.operators.ops import MATMULS, SCHEMAS

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
        assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-4 if a.is_floating_point() else 1.0)


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


def test_operands_need_no_alignment() -> None:
    x, operand, rows, precision = arguments("dense_matmul")
    moved = torch.empty(operand.numel() + 3, dtype=torch.uint8)[3:].copy_(operand)
    assert torch.equal(OPS.dense_matmul(x, moved, rows, precision), OPS.dense_matmul(x, operand, rows, precision))
