"""Compressed layers on the native operators: when they are used, what they compute, when memory is freed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.model import products as operators
from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.coded import coded_class
from featherweight.model.layers.modules import (
    FeatherConv1D,
    FeatherLinear,
    prepare,
    set_cache,
    set_precision,
)
from featherweight.storage.codes import Code
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform
from featherweight.system.memory import PAGEMAP, PRESENT, page_flags

pytestmark = pytest.mark.skipif(not operators.ready(), reason="the native library is not built")

ROWS, COLUMNS = 24, 192


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trits(rows: int = ROWS, columns: int = COLUMNS) -> TritPlanes:
    digits = torch.randint(-1, 2, (2, rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return TritPlanes.encode(digits, numbers(rows, columns // 64, 2).abs(), 64)


def summed() -> Sum:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    uniform = Uniform.encode(codes, numbers(ROWS, 3).abs(), None, 4, 64)
    return Sum.of(uniform, Sparse.encode(numbers(ROWS, COLUMNS), numbers(ROWS, COLUMNS, seed=1) > 2))


def layer_of(code: Code, bias: bool = False, kind: type[FeatherLinear] = FeatherLinear) -> FeatherLinear:
    layer = kind(code.spec, bias=bias, name="layer", compute_dtype=torch.float32)
    extra = {"bias": numbers(ROWS, seed=9)} if bias else {}
    layer.load_state_dict({**code.tensors(), **extra})
    return layer.eval()


def exact(layer: FeatherLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.decode().to(x.dtype), layer.bias)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of the products that the operators compute from now on."""
    calls: list[str] = []
    own = operators.PackedLinear.__call__

    def call(self: Any, x: Tensor, precision: str = "float", threads: int | None = None) -> Tensor:
        calls.append(precision)
        return own(self, x, precision, threads)

    monkeypatch.setattr(operators.PackedLinear, "__call__", call)
    return calls


STEP, PROMPT = (3, 1, COLUMNS), (1, 5, COLUMNS)


@pytest.mark.parametrize("make", [trits, summed])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [FeatherLinear, FeatherConv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_steps_are_the_decoded_product_up_to_rounding(
    make: Callable[[], Code], bias: bool, kind: type[FeatherLinear], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layer = counted(monkeypatch), layer_of(make(), bias, kind)
    x = numbers(*STEP).to(dtype)
    layer.to(dtype)
    with torch.no_grad():
        found, expected = layer(x), exact(layer.float(), x.float())
    assert calls == ["float"]
    assert found.dtype == dtype
    assert torch.allclose(
        found.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 if dtype.itemsize > 2 else 0.1
    )


@torch.no_grad()
def test_which_products_are_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layer = counted(monkeypatch), layer_of(trits(), True)

    def used(x: Tensor) -> list[str]:
        calls.clear()
        result = layer(x)
        assert calls or torch.equal(result, exact(layer, x))
        return list(calls)

    assert used(numbers(*STEP)) == used(numbers(1, COLUMNS)) == used(numbers(COLUMNS)) == ["float"]
    assert used(numbers(*PROMPT)) == used(numbers(17, 1, COLUMNS)) == used(numbers(5, COLUMNS)) == []
    set_precision(layer, "int8")
    assert used(numbers(*STEP)) == used(numbers(*PROMPT)) == used(numbers(5, COLUMNS)) == ["int8"]
    set_precision(layer, "exact")
    assert used(numbers(*STEP)) == used(numbers(*PROMPT)) == []
    set_precision(layer, "float")
    with torch.enable_grad():
        x = numbers(*STEP).requires_grad_()
        assert used(x) == []
        layer(x).sum().backward()
    assert torch.allclose(x.grad[0, 0], layer.decode().sum(0), atol=1e-4)  # type: ignore[index]
    with torch.autocast("cpu", torch.bfloat16):
        calls.clear()
        assert layer(numbers(*STEP)).dtype == torch.bfloat16
        assert calls == []
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of exact, float, int8"):
        set_precision(layer, "fp8")


@torch.no_grad()
def test_int8_products_are_close() -> None:
    layer = layer_of(trits())
    set_precision(layer, "int8")
    x = numbers(1, 40, COLUMNS)
    assert float((layer(x) - exact(layer, x)).norm() / exact(layer, x).norm()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_codes_with_a_rule_for_inputs_keep_it(precision: str) -> None:
    layer = layer_of(QuantizedInput(trits(), 6, 64))
    set_precision(layer, precision)
    for x in (numbers(*STEP), numbers(*PROMPT)):
        expected = quantized_inputs(x, 6, 64) @ layer.decode().T
        assert torch.allclose(layer(x), expected, atol=1e-4)


@torch.no_grad()
def test_packed_memory_follows_the_stored_tensors() -> None:
    layer, x = layer_of(trits()), numbers(*STEP)
    first = layer(x)
    assert layer._packed is not None
    other = TritPlanes.encode(-trits().unpack(), trits().scales, 64)
    layer.load_state_dict(other.tensors())
    assert layer._packed is None
    assert torch.allclose(layer(x), -first)
    layer._parameters["trits"] = torch.nn.Parameter(trits().trits, requires_grad=False)  # as transformers loads
    assert torch.allclose(layer(x), first)
    layer.to(torch.bfloat16)
    assert layer._packed is None
    layer(x)
    layer.settle()
    assert layer._packed is None
    layer(x)
    layer.release()
    assert layer._packed is None
    set_cache(layer, True)
    assert torch.allclose(layer(x), first)


@torch.no_grad()
def test_packed_layers_are_copied_and_saved() -> None:
    layer, x = layer_of(summed(), True), numbers(*STEP)
    expected, keys = layer(x), set(layer.state_dict())
    copied, again = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for one in (copied, again, torch.load(stream, weights_only=False)):
        assert one._packed is None
        assert torch.equal(one(x), expected)
    assert layer._packed is not None
    assert set(layer.state_dict()) == keys == {*summed().tensors(), "bias"}


def mapped_layer(folder: Path) -> tuple[FeatherLinear, dict[str, Tensor]]:
    """A layer whose tensors are mapped from a file, as loaders leave them, and copies of these."""
    code = trits(512, 1024)
    save_file(code.tensors(), folder / "layer.safetensors")
    layer, stored = FeatherLinear(code.spec), load_file(folder / "layer.safetensors")
    for key, tensor in stored.items():
        layer._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
    return layer, {key: tensor.clone() for key, tensor in stored.items()}


def resident_pages(layer: FeatherLinear) -> int:
    return sum(bool(flag & PRESENT) for flag in page_flags(layer._parameters["trits"])[2])


@pytest.mark.skipif(not PAGEMAP.exists(), reason="needs Linux")
@torch.no_grad()
def test_a_packed_layer_is_in_memory_once(tmp_path: Path) -> None:
    layer, stored = mapped_layer(tmp_path)
    assert resident_pages(layer) >= 2 * 512 * 1024 // 5 // 4096 - 2
    x, prompt = numbers(1, 1024), numbers(2, 5, 1024)
    layer(x)
    assert layer._packed is not None
    assert resident_pages(layer) == 0
    expected = prompt @ trits(512, 1024).decode().T
    assert torch.equal(layer(prompt), expected)  # decodes
    assert resident_pages(layer) == 0
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, stored[key]), key
    save_file(layer.state_dict(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "layer.safetensors").read_bytes()


@torch.no_grad()
def test_what_was_written_to_is_not_given_back(tmp_path: Path) -> None:
    layer, stored = mapped_layer(tmp_path)
    layer._parameters["trits"].data[1, 7000] = stored["trits"][1, 7000] = 13
    layer(numbers(1, 1024))
    assert torch.equal(layer._parameters["trits"], stored["trits"])
    own = layer_of(trits(512, 1024))  # of no file
    own(numbers(1, 1024))
    assert torch.equal(own._parameters["trits"], trits(512, 1024).trits)


@torch.no_grad()
def test_threads_that_ask_at_once_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, packed = layer_of(trits()), numbers(*STEP), []
    own = operators.pack_linear
    monkeypatch.setattr(operators, "pack_linear", lambda *args: packed.append(1) or own(*args))
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(layer(x))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1
    assert len(found) == 8
    assert all(torch.equal(one, found[0]) for one in found)


@torch.no_grad()
def test_damage_is_reported_by_name() -> None:
    layer = layer_of(trits())
    layer.trits.fill_(255)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="the compressed layer 'layer' is damaged"):
        layer(numbers(*STEP))


@torch.no_grad()
def test_wrong_kernels_are_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.model.products import dispatch

    for cached in (dispatch._trusted, dispatch._say_none):
        cached.cache_clear()
    own = operators.PackedLinear.__call__
    monkeypatch.setattr(operators.PackedLinear, "__call__", lambda *args, **kwargs: own(*args, **kwargs) * 1.01)
    layer, x = layer_of(trits()), numbers(*STEP)
    try:
        with pytest.warns(RuntimeWarning, match="are wrong on this processor"):
            assert torch.equal(layer(x), exact(layer, x))
        assert torch.equal(layer(x), exact(layer, x))
    finally:
        dispatch._trusted.cache_clear()


@torch.no_grad()
def test_without_the_native_library_matrices_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    layer, x = layer_of(trits()), numbers(*STEP)
    for precision in ("float", "int8"):
        set_precision(layer, precision)
        assert torch.equal(layer(x), exact(layer, x))
    assert prepare(layer) == 0


def embedding_of(code: Code) -> Any:
    embedding = torch.nn.Embedding(ROWS, COLUMNS, padding_idx=0)
    embedding.__class__ = coded_class(torch.nn.Embedding)
    embedding._parameters.pop("weight")
    embedding.hold(code.spec, "embedding", torch.float32, "cpu")
    embedding.load_state_dict(code.tensors())
    return embedding


@torch.no_grad()
@pytest.mark.parametrize("make", [trits, summed])
def test_embeddings_decode_the_rows_that_are_asked_for(
    make: Callable[[], Code], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, decoded = embedding_of(make()), make().decode()
    if make is trits:
        monkeypatch.setattr(type(embedding), "decode", lambda self: pytest.fail("all rows were decoded"))
    for ids in (torch.tensor([[3, 0, 3, 23]]), torch.tensor([7]), torch.zeros(2, 3, 4, dtype=torch.int64)):
        assert torch.equal(embedding(ids), decoded[ids])
        assert torch.equal(embedding.to(torch.bfloat16)(ids), decoded[ids].bfloat16())
        embedding.float()
    monkeypatch.undo()
    assert embedding(torch.zeros(0, dtype=torch.int64)).shape == (0, COLUMNS)
    assert torch.equal(embedding(torch.arange(ROWS)), decoded)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError):
            embedding(torch.tensor([0, wrong]))


class FakeGpuOperand:
    device, nbytes = torch.device("cuda"), 1

    def to(self, device: torch.device) -> FakeGpuOperand:
        return self


@pytest.mark.parametrize(("factor", "failure"), [(1.0, None), (1.1, None), (1.0, OSError("no driver"))])
def test_gpu_kernels_are_checked_before_they_are_used(
    factor: float, failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.model.products import gpu

    code = QuantizedInput(trits(), 8, 64)

    def linear(x: Tensor, operands: Any, bias: Any, precision: str) -> Tensor:
        if failure is not None:
            raise failure
        return factor * quantized_inputs(x, 8, 64) @ code.decode().T

    gpu._warn.cache_clear()
    kernels = SimpleNamespace(
        available=lambda: True, pack_terms=lambda spec, tensors, packing: [FakeGpuOperand()], linear=linear
    )
    monkeypatch.setattr(gpu, "triton", kernels)
    if factor == 1.0 and failure is None:
        packed = operators.pack_gpu(code.spec, code.tensors(), torch.device("cpu"))
        assert packed is not None
        assert packed.device_type == "cuda"
    else:
        with pytest.warns(RuntimeWarning, match="no driver" if failure else "relative error 0.1"):
            assert operators.pack_gpu(code.spec, code.tensors(), torch.device("cpu")) is None
    gpu._warn.cache_clear()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer_of(summed(), True), layer_of(trits())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) + self.second(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_prepared_layers_compile_into_one_graph(backend: str) -> None:
    block = Block()
    assert prepare(block) > 0
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        for shape in (STEP, PROMPT, (2, 7, COLUMNS)):
            x = numbers(*shape)
            expected = torch.relu(exact(block.first, x)) + exact(block.second, x)
            assert torch.allclose(compiled(x), expected, atol=1e-3)


def test_prepared_layers_are_exported() -> None:
    block, x = Block(), numbers(2, COLUMNS)
    prepare(block)
    with torch.no_grad():
        exported = torch.export.export(block, (x,))
        names = {str(node.target) for node in exported.graph.nodes}
        assert any("featherweight.trit_planes_matmul" in name for name in names)
        assert torch.allclose(exported.module()(x), block(x), atol=1e-3)
