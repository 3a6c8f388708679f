"""Adapters of PEFT on compressed layers, and what else is done with a compressed model as with any other."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compressed_folders import TOKENS, Folder, from_pretrained, layers, load_all, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from featherweight.errors import FeatherError
from featherweight.model.layers.modules import CodedModule, FeatherConv1D, FeatherLinear, set_cache
from featherweight.model.layers.weight import DecodedWeight
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.uniform import Uniform


def code_of(rows: int = 6, columns: int = 10) -> Code:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, -(-columns // 4)) + 0.1
    return Uniform.encode(codes, scales, None, 4, 4, scale_dtype=torch.float16)


def layer_of(code: Code, kind: type[FeatherLinear] = FeatherLinear, bias: bool = True) -> FeatherLinear:
    layer = kind({**code.spec, "shape": list(code.shape)}, bias, name="block.up", compute_dtype=torch.float32)
    layer.load_state_dict({**code.tensors(), **({"bias": torch.randn(code.shape[0])} if bias else {})})
    return layer


def stored_digest(model: nn.Module) -> str:
    """Of the stored tensors of all compressed layers."""
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        if isinstance(module, CodedModule):
            for key in module.layout:
                digest.update(f"{name.rpartition('layers.')[2]}.{key}".replace(".base_layer", "").encode())
                digest.update(module._parameters[key].detach().contiguous().view(torch.uint8).numpy().tobytes())  # type: ignore[union-attr]
    return digest.hexdigest()


# The layer itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [FeatherLinear, FeatherConv1D])
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10)])
def test_gradients_are_those_of_the_dense_layer(
    kind: type[FeatherLinear], bias: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    code = code_of()
    layer = layer_of(code, kind, bias)
    dense = nn.Linear(10, 6, bias=bias)
    dense.weight.data = code.decode()
    if bias:
        dense.bias.data = layer.bias.data.clone()  # type: ignore[union-attr]
    layer, dense = layer.to(dtype), dense.to(dtype)
    x, upwards = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 6, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(mine) * upwards).sum().backward()
    (dense(theirs) * upwards).sum().backward()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), dense(x), rtol=tolerance, atol=tolerance * 10)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance * 10)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=tolerance, atol=tolerance * 10)  # type: ignore[union-attr]
    assert all(layer._parameters[key].grad is None for key in layer.layout)  # type: ignore[union-attr]


def test_second_derivatives() -> None:
    code, x = code_of(), torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    layer = layer_of(code).double()

    def through(x: Tensor) -> Tensor:
        return layer(x.sin())

    assert torch.autograd.gradcheck(through, (x,))
    assert torch.autograd.gradgradcheck(through, (x,))


def test_training_keeps_no_decoded_matrix() -> None:
    """What autograd saves for the way back is counted; a layer that caches its matrix may keep it."""
    layer, x = layer_of(code_of(64, 32)), torch.randn(2, 32, requires_grad=True)

    def largest_saved() -> int:
        sizes = [0]

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x).sum().backward()
        return max(sizes)

    assert largest_saved() < 64 * 32
    set_cache(layer, True)
    assert largest_saved() == 64 * 32


def test_rounded_inputs_pass_gradients_straight_through() -> None:
    inner = code_of()
    layer = layer_of(QuantizedInput(inner, 8, 10), bias=False)
    x = torch.randn(3, 10, requires_grad=True)
    upwards = torch.randn(3, 6)
    (layer(x) * upwards).sum().backward()
    torch.testing.assert_close(x.grad, upwards @ inner.decode())


def test_the_weight_says_what_it_is_without_being_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(code_of()).to(torch.bfloat16)
    decoded: list[int] = []
    decode = CodedModule.decode
    monkeypatch.setattr(CodedModule, "decode", lambda self: (decoded.append(1), decode(self))[1])
    weight = layer.weight
    assert isinstance(layer, nn.Linear)
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad) == (
        (6, 10),
        torch.bfloat16,
        "cpu",
        False,
    )
    assert (weight.dim(), weight.numel(), len(weight), weight.size(1), weight.ndim) == (2, 60, 6, 10, 2)
    assert weight.is_floating_point()
    assert "decoded" not in repr(weight).lower().replace("decodedweight", "")
    assert decoded == []
    dense = decode(layer).to(torch.bfloat16)
    assert type(weight + 0) is Tensor
    assert torch.equal(weight, dense)
    assert torch.equal(weight.float().t(), dense.float().t())
    assert torch.equal(weight[1:3], dense[1:3])
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert (weight.float().numpy() == dense.float().numpy()).all()
    assert torch.equal(copy.deepcopy(weight), dense)
    x = torch.randn(3, 10).bfloat16()
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, dense))
    assert weight.tolist() == dense.tolist()


WRITES: dict[str, Callable[[FeatherLinear], Any]] = {
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(6, 10)),
    "data add": lambda layer: layer.weight.data.__iadd__(1),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(6, 10)),
    "data copy": lambda layer: layer.weight.data.copy_(torch.zeros(6, 10)),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "reset": lambda layer: layer.reset_parameters(),
    "out": lambda layer: torch.add(torch.ones(6, 10), 1, out=layer.weight),
    "gradient": lambda layer: layer.weight.requires_grad_(),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 10))),
    "tensor": lambda layer: setattr(layer, "weight", torch.zeros(6, 10)),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_the_weight_is_refused(write: str) -> None:
    layer = layer_of(code_of())
    before = layer.decode()
    with torch.no_grad(), pytest.raises(FeatherError, match=r"the weight of the compressed layer 'block.up' cannot be"):
        WRITES[write](layer)
    assert torch.equal(layer.decode(), before)
    assert isinstance(layer.weight, DecodedWeight)
    assert layer.weight.requires_grad_(False).requires_grad is False


def test_a_dense_code_has_a_weight_of_its_own() -> None:
    layer = layer_of(Dense(torch.randn(6, 10)))
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.data.zero_()
    assert not layer.decode().any()


# The model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(folder_of: Callable[[str], Folder]) -> Folder:
    return folder_of("llama")


def test_copies_dtypes_and_footprint(folder: Folder) -> None:
    model = from_pretrained(AutoModelForCausalLM, folder.path)
    digest, expected = stored_digest(model), logits(model)
    stored = sum(tensor.nbytes for tensor in load_all(folder.path).values())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == stored + buffers
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    # `model.half()` itself is refused by transformers for every compressed model
    for change, dtype in ((nn.Module.half, torch.float16), (lambda m: m.to(torch.bfloat16), torch.bfloat16)):
        changed = change(copy.deepcopy(model))
        assert stored_digest(changed) == digest
        assert {m.weight.dtype for m in layers(changed).values() if "weight" not in m.layout} == {dtype}
        assert logits(changed).dtype == dtype
        assert stored_digest(changed) == digest
    assert torch.equal(logits(model), expected)


def test_a_model_is_compiled(folder: Folder) -> None:
    model = from_pretrained(AutoModelForCausalLM, folder.path)
    expected = logits(model)
    found = logits(torch.compile(model, backend="eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Adapters ------------------------------------------------------------------------------------------------------------


def adapted(base: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "down_proj"], **settings})
    return peft.get_peft_model(base, config)


def one_step(model: Any) -> dict[str, Tensor]:
    """Train on some tokens; the gradients of what is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(trained.values(), lr=0.5)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimiser.step()
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], "all-linear"])
def test_a_training_step_changes_adapters_alone(folder: Folder, target: Any) -> None:
    model = adapted(from_pretrained(AutoModelForCausalLM, folder.path), target_modules=target)
    digest = stored_digest(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), FeatherLinear)]
    assert len(wrapped) == (4 if isinstance(target, list) else len(folder.codes))
    gradients = one_step(model)
    assert stored_digest(model) == digest
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_B" not in name), name  # A has no gradient while B is zero
    assert all("lora_" in name for name in gradients)


def test_gradients_of_adapters_are_those_on_the_decoded_model(folder: Folder) -> None:
    """Among them those of the first block, which come through all compressed layers behind it."""
    mine = adapted(from_pretrained(AutoModelForCausalLM, folder.path), init_lora_weights=False)
    plain = adapted(from_pretrained(AutoModelForCausalLM, folder.decoded), init_lora_weights=False)
    adapters = {name: p for name, p in mine.state_dict().items() if "lora_" in name}
    plain.load_state_dict(adapters, strict=False)
    found, expected = one_step(mine), one_step(plain)
    assert set(found) == set(expected) == set(adapters)
    for name, gradient in found.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))


def test_an_adapter_is_saved_and_loaded_on_the_compressed_model(folder: Folder, tmp_path: Path) -> None:
    model = adapted(from_pretrained(AutoModelForCausalLM, folder.path), init_lora_weights=False)
    one_step(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_all(tmp_path / "adapter"))
    base = from_pretrained(AutoModelForCausalLM, folder.path)
    unadapted = logits(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    assert not torch.allclose(expected, unadapted, atol=1e-3)
    with again.disable_adapter():
        assert torch.equal(logits(again), unadapted)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_in_one_sentence(folder: Folder, safe: bool) -> None:
    model = adapted(from_pretrained(AutoModelForCausalLM, folder.path), init_lora_weights=False).eval()
    expected = logits(model)
    with pytest.raises(FeatherError, match=r"q_proj' cannot be written to .*: keep an adapter beside it"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(from_pretrained(AutoModelForCausalLM, folder.path)))


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha", "oft"])
def test_other_adapters(folder: Folder, kind: str) -> None:
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    config = {
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **targets),
        "loha": lambda: peft.LoHaConfig(r=4, **targets),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **targets),
    }[kind]()
    base = from_pretrained(AutoModelForCausalLM, folder.path)
    digest, before = stored_digest(base), logits(base)
    model = peft.get_peft_model(base, config)
    torch.testing.assert_close(logits(model.eval()), before, rtol=1e-3, atol=1e-3)  # adapters begin at nothing
    assert one_step(model)
    assert stored_digest(model) == digest
    assert not torch.equal(logits(model.eval()), before)
