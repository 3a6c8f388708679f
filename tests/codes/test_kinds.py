"""Every kind of code: the bytes docs/format.md specifies, worked out by hand, and what all kinds must satisfy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from code_samples import KINDS, SHAPES, nested, numbers, per_output, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.modules import FeatherLinear, set_precision
from featherweight.registry import registered
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code, UnknownCodeError, code_from, code_layout, describe_code
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms, values_of_shifts
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import (
    Hadamard,
    hadamard_transform,
    kernel_order,
    paley_matrix,
    random_signs,
    rotate,
    rotate_back,
    splitmix64,
)
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted, inverse_order
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform
from featherweight.tasks.analyse.levels import histogram_of

# What every kind must satisfy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_code_survives_a_file_and_counts_its_bytes(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    code = KINDS[name](*shape)
    path = tmp_path / "code.safetensors"
    write_safetensors(path, [blob_of(key, tensor) for key, tensor in code.tensors().items()], {})
    with SafetensorsFile.open(path) as file:
        stored = {key: file.tensor(key) for key in file.entries}
        assert code.nbytes == sum(entry.nbytes for entry in file.entries.values())
    again = code_from(json.loads(json.dumps(code.spec)), stored)
    assert again.spec == code.spec
    assert torch.equal(again.decode(), code.decode())
    assert code.shape == shape
    assert code.decode().shape == shape
    assert code.decode().dtype == torch.float32
    layout = code_layout(code.spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in code.tensors().items()} == {
        n: (tuple(entry.shape), entry.dtype) for n, entry in layout.items()
    }
    assert code.nbytes == sum(entry.nbytes for entry in layout.values())
    assert all(key.isidentifier() and key != "bias" for key in layout)
    assert describe_code(code.spec) not in ("", code.kind)
    for part in parts_of(code.spec):  # what a wrapper holds is told
        assert describe_code({"shape": list(shape), **part}) in describe_code(code.spec)


def parts_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Specs within a spec, whatever fields they are in."""
    values = [item for value in spec.values() for item in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, dict)]


OWN = [kind for kind, cls in registered("code").items() if cls.__module__.startswith("featherweight.")]


@pytest.mark.parametrize("kind", OWN)
def test_every_registered_kind_has_a_sample(kind: str) -> None:
    assert kind in {make(8, 24).kind for make in KINDS.values()}, f"add a code of the kind {kind!r} to code_samples.py"


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_has_a_matrix_without_rows_or_columns(name: str) -> None:
    spec = KINDS[name](6, 16).spec
    for shape in ([0, 16], [6, 0], [0, 0], [6, -16], [6], [6, 16, 1], [True, 16], [6.0, 16], [6, 1 << 31], None):
        with pytest.raises(ValueError, match="shape is"):
            code_layout({**spec, "shape": shape})


@pytest.mark.parametrize("name", KINDS)
def test_digits_and_scales_are_the_matrix(name: str) -> None:
    """Where a kind says that its matrix is scales times integers, it is."""
    code: Any = KINDS[name](7, 20)
    digits = code.digits()
    if digits is None:
        assert not isinstance(code, TritPlanes | OffsetTrits)
        return
    scales = code.scales.float().reshape(7, digits.shape[2], -1)
    scales = torch.cat([scales, code.offsets.float().unsqueeze(-1)], -1) if hasattr(code, "offsets") else scales
    found = torch.einsum("pogs,ogp->ogs", digits.float(), scales).reshape(7, -1)[:, :20]
    assert torch.allclose(found, code.decode(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_scaled_rows_are_those_of_the_matrix(name: str, shape: tuple[int, int]) -> None:
    """By powers of two, which round nothing; the spec, and with it every stored size, stays. A kind may refuse."""
    code = KINDS[name](*shape)
    factors = 2.0 ** (torch.arange(shape[0]) % 4 - 1)
    scaled = code.rows_scaled(factors)
    assert scaled is None or scaled.spec == code.spec
    assert scaled is None or torch.equal(scaled.decode(), code.decode() * factors.unsqueeze(1))
    refusing = {"uniform-output", "permuted", "binary-planes-strips", "binary-planes-shifts", "quantized-input"}
    refusing |= {"low-rank", "low-rank-int8", "pyramid", "sherry"}
    refusing |= {"sparse", "sparse-float32", "sparse-empty", "sum", "nested", "product-of-sums"}  # sparse ones
    assert (scaled is None) == (name in refusing)


@pytest.mark.parametrize("name", KINDS)
def test_fast_decoding_differs_by_rounding_alone(name: str) -> None:
    code = KINDS[name](7, 20)
    assert torch.allclose(code.decode_fast(), code.decode(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_weights_of_a_group_are_among_its_levels(name: str, shape: tuple[int, int]) -> None:
    code = KINDS[name](*shape)
    along, size = code.grouping()
    matrix = code.decode() if along else code.decode().T
    for row, group in ((0, 0), (matrix.shape[0] - 1, -(-matrix.shape[1] // size) - 1)):
        levels = code.group_levels(row, group)
        assert levels == sorted(levels)
        weights = matrix[row, group * size : (group + 1) * size]
        apart = (weights.unsqueeze(1) - torch.tensor(levels)).abs().amin(1)
        assert bool((apart <= 1e-6 * weights.abs().clamp(min=1)).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_decoded_alone_as_in_the_whole(name: str, shape: tuple[int, int]) -> None:
    code = KINDS[name](*shape)
    matrix = code.decode()
    for first in range(shape[0]):
        for last in range(first + 1, shape[0] + 1):
            assert torch.equal(code.decode_rows(first, last), matrix[first:last])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_any_kind_gives_a_histogram(name: str, shape: tuple[int, int]) -> None:
    weight, code = numbers(*shape, seed=4), KINDS[name](*shape)
    found = histogram_of(weight, code)
    assert 1 <= len(found["weights"]) <= max(shape)


def test_a_histogram_of_groups_of_outputs_shows_such_a_group() -> None:
    weight, code = numbers(12, 6, seed=4), per_output(12, 6)
    found = histogram_of(weight, code)
    first, column = found["first_row"], found["column"]
    assert found["weights"] == weight[first : first + 4, column].tolist()
    nearest = (code.decode()[first : first + 4, column, None] - torch.tensor(found["levels"])).abs().amin(1)
    assert float(nearest.max()) < 1e-6


@pytest.mark.parametrize("wrap", [lambda spec: spec, lambda spec: {"kind": "sum", "terms": [spec, spec]}])
@pytest.mark.parametrize("kind", ["new-kind", ["uniform"], None])
def test_an_unknown_kind_asks_for_an_update(kind: Any, wrap: Any) -> None:
    spec = wrap({"kind": kind})
    nested_kind = isinstance(kind, str) or spec["kind"] != "sum"
    with pytest.raises(UnknownCodeError if nested_kind else ValueError, match="kind"):
        code_layout({**spec, "shape": [4, 8]})


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_tensor_is_named(name: str) -> None:
    code = KINDS[name](6, 16)
    for missing in code.tensors():
        rest = {key: tensor for key, tensor in code.tensors().items() if key != missing}
        with pytest.raises(ValueError, match="is missing"):
            code_from(code.spec, rest)


@pytest.mark.parametrize("name", KINDS)
def test_a_module_holds_every_kind(name: str) -> None:
    """Loaded by its state dict, moved to another dtype, a layer computes with the decoded matrix."""
    code = KINDS[name](6, 16)
    layer = FeatherLinear(code.spec, name="layer", compute_dtype=torch.float32)
    layer.load_state_dict(dict(code.tensors()))
    x = numbers(3, 16, seed=4)
    seen = quantized_inputs(x, code.bits, code.group_size) if isinstance(code, QuantizedInput) else x
    expected = torch.nn.functional.linear(seen, code.decode())
    if code.factored:
        assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
        set_precision(layer, "exact")
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to(torch.bfloat16).weight, code.decode().bfloat16())
    assert {key: tensor.dtype for key, tensor in layer.state_dict().items()} == {
        key: tensor.dtype for key, tensor in code.tensors().items()
    }


def test_parts_of_a_nested_spec_have_no_shape_of_their_own() -> None:
    """So that layers of different shapes with equal settings are listed together in quantization_config."""
    spec = nested(7, 20).spec
    assert '"shape"' not in json.dumps({key: value for key, value in spec.items() if key != "shape"})
    assert set(code_layout(spec)) >= {"inner_column_scales", "inner_inner_order", "inner_inner_inner_terms_0_trits"}


DESCRIPTIONS = {
    "dense": "dense bfloat16",
    "uniform": "4 bit asymmetric g8",
    "uniform-symmetric": "3 bit symmetric g8",
    "uniform-output": "3 bit asymmetric g4 of outputs",
    "trit-planes": "2 trit-planes g8",
    "trit-planes-tied": "3 tied trit-planes g8",
    "trit-planes-log8": "3 tied trit-planes g8",
    "codebook": "3 bit codebook",
    "codebook-groups": "2 bit codebook g8",
    "binary-planes": "2 binary planes g8",
    "binary-planes-strips": "3 binary planes g8 x 3 rows",
    "binary-planes-shifts": "3 binary planes g1 all rows in 3 shifts",
    "offset-trits": "1 trit-plane with offset g8",
    "low-rank": "rank 2 float16",
    "low-rank-int8": "rank 2 int8",
    "sparse": "sparse 23 %",
    "sparse-float32": "sparse 23 %",
    "sparse-empty": "sparse 0 %",
    "pyramid": "pyramid g8",
    "sherry": "sherry g8",
    "sum": "2 trit-planes g8 + sparse 23 %",
    "hadamard": "hadamard 8 of 2 trit-planes g8",
    "column-scaled": "column-scaled 2 trit-planes g8",
    "permuted": "permuted 3 bit asymmetric g4 of outputs",
    "quantized-input": "quantized-input 8 bit g16 of 2 trit-planes g8",
    "nested": "hadamard 8 of column-scaled permuted 2 trit-planes g8 + sparse 23 % + rank 2 int8",
    "product": "product over 3 of dense float16 and sparse 21 %",
    "product-wide": "product over 32 of 4 bit asymmetric g8 and 2 trit-planes g8",
    "product-square": "product over 24 of 2 trit-planes g8 and 2 bit asymmetric g8",
    "product-of-sums": "product over 4 of 4 bit asymmetric g8 + sparse 19 % and permuted rank 2 int8",
    "product-in-a-sum": "2 bit asymmetric g8 + hadamard 8 of product over 2 of dense float16 and sparse 19 %",
    "product-of-products": "product over 2 of product over 5 of 4 bit asymmetric g8 and sparse 10 % "
    "and product over 7 of dense float16 and sparse 24 %",
}


@pytest.mark.parametrize("name", KINDS)
def test_descriptions(name: str) -> None:
    assert describe_code(KINDS[name](8, 24).spec) == DESCRIPTIONS[name]


def test_other_descriptions() -> None:
    spec = {"planes": 1, "tied": False, "group_size": 128}
    assert describe_code({"kind": "trit-planes", **spec}) == "1 trit-plane g128"
    assert describe_code({"kind": "binary-planes", "planes": 1, "group_size": 8}) == "1 binary plane g8"
    assert describe_code({"kind": "sparse", "entries": 3}) == "sparse"  # of a shape that is not told
    assert describe_code({"kind": "of-a-plugin", "bits": 3, "inner": {"kind": "dense", "dtype": "float16"}}) == (
        "of-a-plugin 3 bit of dense float16"
    )


# Golden bytes, kind by kind ------------------------------------------------------------------------------------------


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


def test_paley_matrices_begin_as_specified() -> None:
    assert paley_matrix(12)[:2].tolist() == [[1] * 12, [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]]
    assert paley_matrix(20)[0].tolist() == [1] * 20
    assert paley_matrix(28)[:2, :4].tolist() == [[1, -1, 1, 1], [-1, -1, 1, -1]]
    assert [kernel_order(n) for n in (1, 12, 40, 28, 3, 36, 0, 6, 11008)] == [
        1,
        12,
        20,
        28,
        None,
        None,
        None,
        None,
        None,
    ]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 12, 16, 20, 28]), st.integers(1, 4), st.integers(1, 4), st.integers(0, (1 << 53) - 1))
def test_rotations_are_orthogonal(block: int, blocks: int, rows: int, seed: int) -> None:
    x = numbers(rows, block * blocks).double()
    turned = rotate(x, block, seed)
    assert torch.allclose(rotate_back(turned, block, seed), x, atol=1e-13)
    assert torch.allclose(turned @ turned.T, x @ x.T, atol=1e-12)


@pytest.mark.parametrize("block", [1, 8, 12])
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


def test_a_uniform_spec_without_axis_means_what_it_did() -> None:
    code = Uniform.encode(torch.zeros(2, 8), torch.ones(2, 2), None, 4, 4)
    assert "axis" not in code.spec
    assert code_layout(code.spec)["scales"].shape == (2, 2)


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


# What is refused ---------------------------------------------------------------------------------------------------

DENSE = {"kind": "dense", "dtype": "float32"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "hadamard", "block": 3, "seed": 0, "inner": DENSE}, "block is 3"),
        ({"kind": "hadamard", "block": 16, "seed": 0, "inner": DENSE}, "block is 16"),
        ({"kind": "hadamard", "block": 4, "seed": -1, "inner": DENSE}, "seed"),
        ({"kind": "hadamard", "block": 4, "seed": 0}, "inner is None"),
        (
            {"kind": "hadamard", "block": 4, "seed": 0, "inner": {**DENSE, "shape": [4, 12]}},
            r"inner has shape \[4, 12\]",
        ),
        ({"kind": "permuted", "inner": [DENSE]}, "inner is"),
        ({"kind": "column-scaled", "inner": DENSE, "scale_dtype": "int8"}, "scale_dtype"),
        ({"kind": "sum", "terms": [DENSE]}, "terms is"),
        ({"kind": "sum", "terms": [DENSE, {"dtype": "float32"}]}, "terms_1 is"),
        ({"kind": "sparse", "entries": 97}, "entries"),
        ({"kind": "sparse"}, "entries"),
        ({"kind": "low-rank", "rank": 9}, "rank"),
        ({"kind": "low-rank", "rank": 2, "factor_dtype": "int4"}, "factor_dtype"),
        ({"kind": "codebook", "bits": 9}, "bits"),
        ({"kind": "codebook", "bits": 2, "group_size": 0}, "group_size"),
        ({"kind": "binary-planes", "planes": 0, "group_size": 8}, "planes"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "rows_per_scale": 0}, "rows_per_scale"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "shift_terms": 0}, "shift_terms"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "shift_terms": 3, "exponent_bias": 200}, "exponent"),
        ({"kind": "offset-trits", "group_size": 8, "packing": "base4"}, "packing"),
        ({"kind": "uniform", "bits": 3, "group_size": 8, "axis": "rows"}, "axis"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_spec_is_a_value_error(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_layout({"shape": [8, 12], **spec})


def test_specs_nested_without_end_are_refused() -> None:
    spec: dict[str, Any] = DENSE
    for depth in range(400):
        spec = {"kind": "permuted", "inner": spec}
        if depth < 7:
            code_layout({"shape": [8, 12], **spec})
    with pytest.raises(ValueError, match="deep"):
        code_layout({"shape": [8, 12], **spec})
    with pytest.raises(ValueError, match="inner has shape 7"):
        code_layout({"shape": [8, 12], "kind": "permuted", "inner": {**DENSE, "shape": 7}})


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("order", lambda t: torch.zeros_like(t), "permutation"),
        ("row_pointers", lambda t: t.flip(0), "row_pointers"),
        ("columns", lambda t: t + 100, "columns"),
        ("columns", lambda t: t.flip(0), "ascending"),
        ("shifts", lambda t: torch.full_like(t, -128), "-128"),
    ],
)
def test_damaged_tensors_are_refused(tensor: str, change: Any, message: str) -> None:
    code: Code = {
        "order": KINDS["permuted"](6, 16),
        "shifts": KINDS["binary-planes-shifts"](6, 16),
    }.get(tensor, sparse(6, 16))
    with pytest.raises(ValueError, match=message):
        code_from(code.spec, code.tensors() | {tensor: change(code.tensors()[tensor])})


def test_terms_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Sum.of(Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="column_scales"):
        ColumnScaled(Dense(torch.zeros(2, 3)), torch.zeros(2))
    with pytest.raises(ValueError, match="order has 2"):
        Permuted.encode(Dense(torch.zeros(2, 3)), torch.arange(2))
    with pytest.raises(ValueError, match="-1 or 1"):
        BinaryPlanes.encode(torch.zeros(1, 2, 3), torch.zeros(2, 1, 1), 8)
    with pytest.raises(ValueError, match="codebooks"):
        Codebook.encode(torch.zeros(2, 3), torch.zeros(2, 3))


# Byte counts ---------------------------------------------------------------------------------------------------------


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
    output_groups = -(-rows // size)
    assert nbytes(kind="uniform", bits=bits, group_size=size, axis="output") == -(
        -rows * columns * bits // 8
    ) + 2 * output_groups * columns + -(-output_groups * columns * bits // 8)
