"""Whole layers: wrappers, sums, low rank, sparse parts and biases, against the decoded matrix."""

from __future__ import annotations

import pytest
import torch
from operand_samples import (
    codebook,
    dense,
    instruction_set,
    isas,
    needs_native,
    numbers,
    scales_of,
    sherry,
    trits,
    uniform,
    with_offsets,
)
from torch import Tensor

from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.products import PackedLinear, apply_terms, pack_code, pack_linear
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum

pytestmark = needs_native

ROWS, COLUMNS = 37, 240


def low_rank(dtype: torch.dtype = torch.float16, rank: int = 5) -> LowRank:
    return LowRank.encode(numbers(ROWS, rank), numbers(rank, COLUMNS, seed=1), dtype)


def sparse(share: float = 0.03) -> Sparse:
    return Sparse.encode(numbers(ROWS, COLUMNS, seed=2), torch.rand(ROWS, COLUMNS) < share)


def offset_trits() -> OffsetTrits:
    digits = torch.randint(-1, 2, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    return OffsetTrits.encode(digits, scales_of(ROWS, 3), 0.1 * numbers(ROWS, 3, seed=5), 100)


def binary(planes: int, rows_per_scale: int | None = 1, group_size: int = 64) -> BinaryPlanes:
    signs = torch.randint(0, 2, (planes, ROWS, COLUMNS), generator=torch.Generator().manual_seed(6)) * 2 - 1
    strips = 1 if rows_per_scale is None else -(-ROWS // rows_per_scale)
    return BinaryPlanes.encode(signs, scales_of(strips, -(-COLUMNS // group_size), planes), group_size, rows_per_scale)


def permuted(inner: Code) -> Permuted:
    return Permuted.encode(inner, torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(7)))


def column_scaled(inner: Code) -> ColumnScaled:
    return ColumnScaled(inner, scales_of(1, COLUMNS)[0].half())


CODES: dict[str, Code] = {
    "low-rank": low_rank(),
    "low-rank-int8": low_rank(torch.int8, 20),
    "low-rank-1": low_rank(torch.float32, 1),
    "sparse": sparse(),
    "sparse-empty": sparse(0.0),
    "offset-trits": offset_trits(),
    "uniform-offsets": with_offsets(ROWS, COLUMNS),
    "uniform-offsets-16": with_offsets(ROWS, COLUMNS, 2, 16, torch.float32),
    "offsets-in-a-basis": permuted(column_scaled(Sum.of(sparse(), with_offsets(ROWS, COLUMNS, 5, 80)))),
    "offsets-product": Product(with_offsets(ROWS, 70, 4, 35), with_offsets(70, COLUMNS, 8, 240)),
    "binary-1": binary(1),
    "binary-3": binary(3, None),
    "binary-5": binary(5, 10),
    "binary-narrow": binary(2, None, 8),
    "permuted": permuted(trits(ROWS, COLUMNS, 2, 64)),
    "column-scaled": column_scaled(uniform(ROWS, COLUMNS, 3, 80, symmetric=False)),
    "hadamard": Hadamard(trits(ROWS, COLUMNS, 2, 32, tied=True, weights=(3, 2), scale_dtype="log8"), 16, 9),
    "hadamard-20": Hadamard(uniform(ROWS, COLUMNS), 240 // 12, 9),
    "hadamard-3": Hadamard(uniform(ROWS, COLUMNS, 3, 48), 3, 9),
    "hadamard-whole": Hadamard(trits(ROWS, COLUMNS, 2, 40), COLUMNS, 9),
    "sum": Sum.of(trits(ROWS, COLUMNS), low_rank(torch.int8), sparse()),
    "nested": permuted(column_scaled(Sum.of(permuted(Hadamard(dense(ROWS, COLUMNS), 48, 1)), codebook(ROWS, COLUMNS)))),
    "product": Product(uniform(ROWS, 70, 4, 32), trits(70, COLUMNS, 3, 64)),
    "product-of-sums": Product(
        Sum.of(dense(ROWS, 20), trits(ROWS, 20)), Sum.of(uniform(20, COLUMNS), codebook(20, COLUMNS))
    ),
    "product-sparse": Product(
        dense(ROWS, 300), Sparse.encode(numbers(300, COLUMNS), numbers(300, COLUMNS, seed=3).abs() > 1.8)
    ),
    "product-in-a-basis": Hadamard(
        column_scaled(Product(Hadamard(uniform(ROWS, 32), 16, 2), sherry(32, COLUMNS))), 16, 1
    ),
    "product-and-others": Sum.of(
        trits(ROWS, COLUMNS), permuted(Product(sparse(), uniform(COLUMNS, COLUMNS, 3))), sparse()
    ),
    "rounds-inside": permuted(QuantizedInput(sherry(ROWS, COLUMNS), 6, 32)),
}


def close(found: Tensor, expected: Tensor, code: Code, x: Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest that a sum of |w x| can be."""
    bound = tolerance * code.decode().double().norm(dim=1) * x.double().norm(dim=-1, keepdim=True)
    return bool(((found.double() - expected.double()).abs() <= bound + 1e-12).all())


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_layers_compute_with_the_decoded_matrix(name: str, with_bias: bool) -> None:
    code, bias = CODES[name], numbers(ROWS, seed=8) if with_bias else None
    packed = pack_linear(code.spec, code.tensors(), bias)
    assert (packed.rows, packed.cols) == code.shape
    for tokens in (1, 3, 18):
        x = numbers(tokens, COLUMNS, seed=9)
        expected = x.double() @ code.decode().double().T + (0 if bias is None else bias.double())
        found = packed(x)
        assert close(found, expected, code, x)
        for threads in (2, 5):
            assert torch.equal(packed(x, threads=threads), found)
        traced = apply_terms(x, packed.terms, packed.bias, ROWS, "float")
        assert close(traced, expected, code, x)
        assert close(packed(x, "int8"), expected, code, x, 0.02)


@pytest.mark.parametrize("name", CODES)
def test_layers_give_the_same_bits_on_every_instruction_set(name: str) -> None:
    packed, x = pack_code(CODES[name]), numbers(6, COLUMNS)
    for precision in ("float", "int8"):
        with instruction_set("baseline"):
            expected = packed(x, precision)
        for isa in isas():
            with instruction_set(isa):
                if "plain" in packed.layouts:  # these agree to rounding only
                    found = packed(x, precision)
                    assert close(found, expected, CODES[name], x, 1e-5), (isa, precision)
                    expected = found
                assert torch.equal(packed(x, precision, threads=2), expected), (isa, precision)
                assert torch.equal(packed(x[:1], precision, threads=1), expected[:1]), (isa, precision)


def test_the_outermost_rule_for_inputs_is_kept() -> None:
    code = QuantizedInput(Sum.of(uniform(ROWS, COLUMNS, 6, 32), sparse()), 6, 32)
    x, packed = numbers(4, COLUMNS), pack_code(code)
    rounded = quantized_inputs(x, 6, 32)
    assert close(packed(x), rounded.double() @ code.decode().double().T, code, x)
    assert not close(packed(x), x.double() @ code.decode().double().T, code, x, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)])
def test_inputs_of_any_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    code = trits(ROWS, COLUMNS)
    x = numbers(*shape).to(dtype)
    found = pack_code(code)(x)
    assert found.dtype == dtype
    assert found.shape == (*shape[:-1], ROWS)
    expected = x.double() @ code.decode().double().T
    assert torch.allclose(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_wrong_shapes_are_refused() -> None:
    packed = pack_code(trits(ROWS, COLUMNS))
    with pytest.raises(ValueError, match="the input has 239 columns, the layer 240"):
        packed(numbers(2, COLUMNS - 1))
    with pytest.raises(ValueError, match="bias is"):
        pack_code(trits(ROWS, COLUMNS), numbers(ROWS + 1))


def test_memory_and_layouts_are_told() -> None:
    packed = pack_code(CODES["sum"])
    assert packed.layouts == (packed.layouts[0], "fields", "fields", "sparse")
    entries = CODES["sum"].terms[2].entries  # type: ignore[attr-defined]
    assert packed.weight_bytes == sum(o.weight_bytes for o in packed.operands) + 4 * (ROWS + 1) + 8 * entries
    assert packed.nbytes >= packed.weight_bytes
    assert "binary-planes has no layout" in pack_code(CODES["binary-narrow"]).note
    assert isinstance(packed, PackedLinear)
    large = pack_code(dense(1100, 1024))
    assert large.nbytes > 1 << 21
    assert large.operands[0].memory.data_ptr() % 4096 == 0


def test_binary_planes_and_offsets_are_not_decoded() -> None:
    assert pack_code(CODES["binary-5"]).note == pack_code(CODES["offset-trits"]).note == ""
    digits = torch.randint(-1, 2, (512, 4096), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    code = OffsetTrits.encode(digits, scales_of(512, 32), numbers(512, 32), 128)
    assert pack_code(code).weight_bytes < 0.35 * 512 * 4096
