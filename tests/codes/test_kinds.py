"""What every kind of code must satisfy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from code_samples import KINDS, SHAPES, nested, numbers, per_output

from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.modules import FeatherLinear, set_precision
from featherweight.registry import registered
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import UnknownCodeError, code_from, code_layout, describe_code
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.tasks.analyse.levels import histogram_of


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
    if getattr(code, "offsets", None) is not None:
        scales = torch.cat([scales, code.offsets.float().unsqueeze(-1)], -1)
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
    refusing |= {"masked", "masked-empty"}
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
    "uniform-offsets": "4 bit with offsets g8",
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
    "masked": "masked 58 %",
    "masked-int8": "masked 58 % 8 bit",
    "masked-int4": "masked 58 % 4 bit",
    "masked-empty": "masked 0 %",
    "product-masked": "product over 6 of masked 56 % 8 bit and dense float16",
    "low-rank": "rank 2 float16",
    "low-rank-int8": "rank 2 int8",
    "sparse": "sparse 23 %",
    "sparse-float32": "sparse 23 %",
    "sparse-empty": "sparse 0 %",
    "pyramid": "pyramid g8",
    "sherry": "sherry g8",
    "sum": "2 trit-planes g8 + sparse 23 %",
    "sign-factor": "signs x rank 3 float16",
    "sign-stack": "column-scaled signs x rank 3 float16 + signs x rank 3 float16 + signs x rank 3 float16",
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
