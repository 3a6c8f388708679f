"""Products of two codes: the bytes docs/format.md specifies, shapes of parts, memory, layers with them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from code_samples import KINDS, dictionary, low_rank, numbers, sparse, trit_planes, uniform

from featherweight.model import products as operators
from featherweight.model.layers.modules import FeatherConv1D, FeatherLinear, set_cache, set_precision
from featherweight.model.products import gpu
from featherweight.storage.checkpoint.format import FORMAT_VERSION, module_layout, module_specs, quantization_config
from featherweight.storage.codes import Code, code_from, code_layout
from featherweight.storage.codes import product as product_module
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank, ordered_product
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum

needs_native = pytest.mark.skipif(not operators.ready(), reason="the native library is not built")


def test_product_by_hand() -> None:
    left = Dense(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]], dtype=torch.float16))
    right = torch.tensor([[0.0, 5.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0]])
    code = Product(left, Sparse.encode(right, right != 0))
    assert code.spec == {
        "kind": "product",
        "shape": [3, 4],
        "left": {"kind": "dense", "shape": [3, 2], "dtype": "float16"},
        "right": {"kind": "sparse", "shape": [2, 4], "entries": 3, "value_dtype": "float16"},
    }
    assert list(code.tensors()) == ["left_weight", "right_row_pointers", "right_columns", "right_values"]
    assert code.decode().tolist() == [[8.0, 5.0, 0.0, 1.0], [-4.0, 0.0, 0.0, 0.0], [2.0, 15.0, 0.0, 3.0]]
    assert code.nbytes == 6 * 2 + 3 * 4 + 3 * 2 + 3 * 2


def test_sums_go_from_the_first_to_the_last() -> None:
    """(1e8 + 1) - 1e8 in float32 is 0, and so in whatever rows a window has."""
    code = Product(Dense(torch.tensor([[1e8, 1.0, -1e8]] * 3)), Dense(torch.ones(3, 2)))
    assert code.decode().tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 300), (3, 400, 1 << 17), (200, 2, 900)])
def test_ordered_products_are_the_loop_that_docs_format_has(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right = numbers(rows, inner), numbers(inner, columns, seed=1)
    expected = left[:, :1] * right[:1]
    for k in range(1, inner):
        expected = expected + left[:, k : k + 1] * right[k : k + 1]
    assert torch.equal(ordered_product(left, right), expected)


def test_a_part_has_a_shape_of_its_own_only_where_it_differs() -> None:
    """So that layers of different shapes with square factors are listed together."""
    code = Product(trit_planes(8, 24), uniform(24, 24))
    assert "shape" not in code.spec["left"]
    assert code.spec["right"]["shape"] == [24, 24]
    said = {**code.spec, "left": {**code.spec["left"], "shape": [8, 24]}}  # saying it is no fault
    assert code_layout(said) == code_layout(code.spec)
    assert torch.equal(code_from(said, code.tensors()).decode(), code.decode())


def test_factors_must_fit() -> None:
    with pytest.raises(ValueError, match=r"as many columns left as rows right, not \[2, 3\] times \[4, 5\]"):
        Product(Dense(torch.zeros(2, 3)), Dense(torch.zeros(4, 5)))
    spec = Product(Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 5))).spec
    left, right = spec["left"], spec["right"]
    for change, message in (
        ({"left": {**left, "shape": [4, 3]}}, r"left is \[4, 3\] and right \[3, 5\], expected \[2, k\] and \[k, 5\]"),
        ({"right": {**right, "shape": [4, 5]}}, "left is"),
        ({"right": {**right, "shape": [3, 6]}}, "left is"),
        ({"left": {**left, "shape": [2, -3]}}, r"left: shape is \[2, -3\]"),
        ({"left": {**left, "shape": [2, 0]}}, "left: shape is"),
        ({"left": {**left, "shape": "2x3"}}, "left: shape is '2x3'"),
        ({"left": {"kind": "dense", "dtype": "float32"}}, r"left is \[2, 5\]"),  # the shape of the whole
        ({"left": {**left, "shape": [2, 81]}, "right": {**right, "shape": [81, 5]}}, "81 columns, expected at most 80"),
        ({"left": None}, "left is None"),
        ({"right": [right]}, "right is"),
    ):
        with pytest.raises(ValueError, match=message):
            code_layout({**spec, **change})
    for field in ("left", "right"):
        with pytest.raises(ValueError, match=f"{field} is None"):
            code_layout({name: value for name, value in spec.items() if name != field})


def test_only_products_have_parts_of_other_shapes() -> None:
    wide = {"kind": "dense", "dtype": "float32", "shape": [8, 25]}
    for spec in ({"kind": "sum", "terms": [wide, wide]}, {"kind": "permuted", "inner": wide}):
        with pytest.raises(ValueError, match=r"has shape \[8, 25\], expected that of the whole, \[8, 24\]"):
            code_layout({"shape": [8, 24], **spec})


class Watched(Code):
    """A code that notes which rows were decoded."""

    def __init__(self, code: Code) -> None:
        self.code, self.decoded, self.shape = code, list[tuple[int, int]](), code.shape
        self.kind = code.kind  # type: ignore[misc]

    @property
    def spec(self) -> dict[str, Any]:
        return self.code.spec

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.code.tensors()

    def decode(self) -> torch.Tensor:
        self.decoded.append((0, self.shape[0]))
        return self.code.decode()

    def decode_rows(self, first: int, last: int) -> torch.Tensor:
        self.decoded.append((first, last))
        return self.code.decode_rows(first, last)

    layout = from_tensors = None  # type: ignore[assignment]


def test_rows_are_decoded_in_windows_and_the_right_factor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_module, "DECODED_AT_ONCE", 80 * 7)
    code = Product(uniform(203, 7, 3), trit_planes(7, 33))
    expected = ordered_product(code.left.decode(), code.right.decode())
    left, right = Watched(code.left), Watched(code.right)
    assert torch.equal(Product(left, right).decode(), expected)
    assert left.decoded == [(0, 80), (80, 160), (160, 203)]
    assert right.decoded == [(0, 7)]
    for first, last in ((3, 4), (41, 180), (80, 203)):
        left.decoded.clear()
        assert torch.equal(Product(left, right).decode_rows(first, last), expected[first:last])
        assert (left.decoded[0][0], left.decoded[-1][1]) == (first, last)


@pytest.mark.parametrize("bits", [1, 3, 7])
def test_rows_inside_a_byte_do_not_take_the_whole_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last rows that begin a byte on, at most 40 of them."""
    code = uniform(400, 7, bits)
    expected, sizes = code.decode(), list[int]()
    own = type(code).decode

    def decode(self: Any) -> torch.Tensor:
        sizes.append(self.shape[0])
        return own(self)

    monkeypatch.setattr(type(code), "decode", decode)
    assert torch.equal(code.decode_rows(203, 205), expected[203:205])
    assert max(sizes) <= 42


# The folder ----------------------------------------------------------------------------------------------------------


def test_quantization_config_keeps_its_version() -> None:
    """A product is a kind that older releases do not know, and say so; what they know means what it did."""
    specs = {"a": dictionary(8, 24).spec, "b": trit_planes(8, 24).spec, "c": trit_planes(6, 24).spec}
    config = json.loads(json.dumps(quantization_config(specs, {"name": "test"})))
    assert config["format_version"] == FORMAT_VERSION == 1
    assert len(config["codes"]) == 2
    assert module_specs(config) == json.loads(json.dumps(specs))
    assert module_layout("a", module_specs(config)["a"]) == code_layout(specs["a"])


# Layers --------------------------------------------------------------------------------------------------------------


def layer_of(code: Code, bias: bool = False, kind: type[FeatherLinear] = FeatherLinear) -> FeatherLinear:
    layer = kind(code.spec, bias=bias, name="layer", compute_dtype=torch.float32)
    layer.load_state_dict({**code.tensors(), **({"bias": numbers(code.shape[0], seed=9)} if bias else {})})
    return layer.eval()


PRODUCTS = [name for name in KINDS if name.startswith("product")]


@pytest.mark.parametrize("kind", [FeatherLinear, FeatherConv1D])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_layers_multiply_with_products(name: str, bias: bool, kind: type[FeatherLinear]) -> None:
    """One token and several, each precision: within rounding of the decoded matrix."""
    code = KINDS[name](16, 48)
    layer = layer_of(code, bias, kind)
    exact = code.decode().double()
    for tokens in (1, 5):
        x = numbers(tokens, 48, seed=4)
        expected = x.double() @ exact.T + (layer.bias.double() if layer.bias is not None else 0)
        size = float(expected.detach().abs().max())
        with torch.no_grad():
            for precision, tolerance in (("float", 1e-5), ("exact", 1e-5), ("int8", 0.03)):
                set_precision(layer, precision)
                assert float((layer(x).double() - expected).abs().max()) <= tolerance * size, (precision, tokens)


def test_the_matrix_is_not_made_where_two_products_do(monkeypatch: pytest.MonkeyPatch) -> None:
    code = dictionary(16, 48)
    layer, x = layer_of(code, bias=True), numbers(5, 48, seed=4).requires_grad_()
    expected = torch.nn.functional.linear(x.detach(), code.decode(), layer.bias)
    monkeypatch.setattr(Product, "decode_rows", None)  # neither in float nor, with gradients, in training
    found = layer(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert x.grad is not None
    monkeypatch.undo()
    assert torch.allclose(x.grad, code.decode().sum(0).expand(5, -1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        set_cache(layer, True)
        assert torch.equal(layer(x), expected)
        assert layer._cached is not None


@needs_native
def test_what_lies_between_the_factors_is_not_rounded() -> None:
    """int8: the input is rounded as the first factor asks, the second takes floats, whichever way it runs."""
    wide = uniform(96, 48, 8)  # rounding what it takes would cost about 1 %
    x = numbers(4, 48, seed=4)
    for right in (uniform(48, 48, 8), Sum.of(uniform(48, 48, 8), sparse(48, 48))):
        first = operators.pack_code(right)(x, "int8")
        found = operators.pack_code(Product(uniform(96, 48, 8), right))(x, "int8")
        expected = first.double() @ wide.decode().double().T
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@needs_native
def test_single_factors_are_one_native_term_and_others_two_layers() -> None:
    single = operators.pack_code(Product(uniform(16, 8), trit_planes(8, 48)))
    assert [term.kind for term in single.terms] == ["low-rank"]
    assert single.products == ()
    assert single.address
    sums = operators.pack_code(Product(Sum.of(uniform(16, 8), trit_planes(16, 8)), uniform(8, 48)))
    assert [term.kind for term in sums.terms] == ["low-rank", "low-rank"]
    turned = operators.pack_code(
        Hadamard(ColumnScaled(Product(uniform(16, 8), uniform(8, 48)), numbers(48).abs()), 16, 1)
    )
    assert [step.kind for step in turned.terms[0].steps] == ["hadamard", "scale"]
    for code in (
        dictionary(16, 48),
        Product(sparse(16, 8), uniform(8, 48)),
        Product(low_rank(16, 8), uniform(8, 48)),
        Product(Hadamard(uniform(16, 8), 8, 1), uniform(8, 48)),
    ):
        packed = operators.pack_code(code)
        assert [term.kind for term in packed.terms] == ["product"]
        assert packed.products == packed.terms
        assert not packed.address
        assert packed.nbytes >= packed.weight_bytes > 0
    assert operators.pack_code(dictionary(16, 48)).layouts == ("plain", "sparse")


@needs_native
def test_the_input_of_a_product_is_rounded_once() -> None:
    code = QuantizedInput(dictionary(16, 48), 6, 16)
    packed, x = operators.pack_code(code), numbers(3, 48, seed=4)
    layer = layer_of(code)
    with torch.no_grad():
        expected = layer(x)  # rounds, then decodes and multiplies
    assert torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_a_layer_with_a_product_can_be_exported() -> None:
    code = Sum.of(uniform(16, 48), dictionary(16, 48), Product(uniform(16, 8), uniform(8, 48)))
    layer, x = layer_of(code, bias=True), numbers(2, 48, seed=4)
    layer.packed()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        assert torch.allclose(exported.module()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [False, True])
def test_products_on_a_gpu_are_two_in_a_row(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels of which only what they compute is known: what is packed, in which order, at what precision, and
    that wrong results are found before the first use."""
    asked: list[tuple[tuple[int, int], torch.dtype, str]] = []

    def linear(x: torch.Tensor, operands: Any, bias: Any, precision: str) -> torch.Tensor:
        (code,) = operands
        asked.append((code.shape, x.dtype, precision))
        matrix = code.decode() * (0.9 if wrong and code.shape[0] == 3 else 1)
        return (x.float() @ matrix.T).to(x.dtype)

    def pack_terms(spec: dict[str, Any], tensors: dict[str, torch.Tensor], packing: str) -> list[Any]:
        code = code_from(spec, tensors)
        made = SimpleNamespace(shape=code.shape, decode=code.decode, device=torch.device("cpu"), nbytes=code.nbytes)
        made.to = lambda device: made
        return [made]

    monkeypatch.setattr(gpu, "triton", SimpleNamespace(available=lambda: True, pack_terms=pack_terms, linear=linear))
    gpu._warn.cache_clear()
    code = Hadamard(ColumnScaled(dictionary(16, 48), numbers(48).abs()), 16, 1)
    if wrong:
        with pytest.warns(RuntimeWarning, match="relative error 0.1"):
            assert operators.pack_gpu(code.spec, code.tensors(), torch.device("cpu")) is None
        gpu._warn.cache_clear()
        return
    packed = operators.pack_gpu(code.spec, code.tensors(), torch.device("cpu"))
    assert packed is not None
    assert packed.nbytes == code.nbytes
    asked.clear()
    x = numbers(5, 48, seed=4).bfloat16()
    found = packed(x, "int8")
    assert asked == [((3, 48), torch.float32, "int8"), ((16, 3), torch.float32, "float")]
    assert found.dtype == torch.bfloat16
    expected = x.double() @ code.decode().double().T
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3
    asked.clear()
    plain = uniform(16, 48)
    single = operators.pack_gpu(plain.spec, plain.tensors(), torch.device("cpu"))
    assert single is not None
    assert torch.equal(single(x), linear(x, [plain], None, ""))


def test_low_rank_codes_are_as_they_were() -> None:
    """The loop of the sums moved; the bits did not."""
    code = LowRank.encode(numbers(37, 5), numbers(5, 4000, seed=1), torch.float16)
    left, right = code.factors()
    expected = left[:, :1] * right[:1]
    for k in range(1, 5):
        expected += left[:, k : k + 1] * right[k : k + 1]
    assert torch.equal(code.decode(), expected)
