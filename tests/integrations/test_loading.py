"""from_pretrained of compressed folders: the same logits, the same tensors, clear errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import compressed_folders as tiny
import pytest
import torch
import transformers
from compressed_folders import (
    MODELS,
    TOKENS,
    V5,
    Folder,
    assert_same_logits,
    auto_class,
    from_pretrained,
    layers,
    logits,
)

import featherweight
from featherweight.errors import CheckpointError
from featherweight.model.layers.modules import CodedModule, FeatherLinear, set_cache


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_decoded_model(name: str, folder_of: Callable[[str], Folder]) -> None:
    folder = folder_of(name)
    model = from_pretrained(auto_class(name), folder.path)
    assert layers(model).keys() == folder.codes.keys()
    expected = logits(from_pretrained(auto_class(name), folder.decoded))
    assert expected.abs().max() > 0.1
    assert_same_logits(logits(model), expected)
    set_cache(model, True)
    assert_same_logits(logits(model), expected)
    assert_same_logits(logits(model), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_tensors_keep_their_bytes_in_any_dtype(
    name: str, dtype: torch.dtype, folder_of: Callable[[str], Folder]
) -> None:
    folder = folder_of(name)
    model = from_pretrained(auto_class(name), folder.path, dtype)
    assert model.dtype == dtype
    assert_stored(model, folder)
    plain = {n: p.dtype for n, p in model.named_parameters() if not stored_in_layer(model, n)}
    assert set(plain.values()) == {dtype}
    if dtype == torch.bfloat16:
        assert_same_logits(logits(model), logits(from_pretrained(auto_class(name), folder.decoded, dtype)))
    for convert in (torch.nn.Module.float, torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16):
        convert(model)
        assert_stored(model, folder)
    model.to(torch.float32)
    assert_stored(model, folder)
    copied = copy.deepcopy(model)
    assert_stored(copied, folder)
    assert_same_logits(logits(copied), logits(model))


def stored_in_layer(model: Any, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    return isinstance(layer, CodedModule) and leaf in layer.layout


def assert_stored(model: Any, folder: Folder) -> None:
    found = layers(model)
    for name, code in folder.codes.items():
        for key, tensor in code.tensors().items():
            loaded = found[name]._parameters[key]
            assert loaded.dtype == tensor.dtype
            assert not loaded.requires_grad
            assert torch.equal(loaded, tensor), f"{name}.{key}"


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_device_map(name: str, device_map: Any, folder_of: Callable[[str], Folder]) -> None:
    pytest.importorskip("accelerate")
    folder = folder_of(name)
    model = from_pretrained(auto_class(name), folder.path, device_map=device_map, low_cpu_mem_usage=True)
    assert_stored(model, folder)
    assert_same_logits(logits(model), logits(from_pretrained(auto_class(name), folder.decoded)))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_cpu_offload(name: str, folder_of: Callable[[str], Folder]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = from_pretrained(auto_class(name), folder_of(name).path)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(layer._parameters[key].is_meta for layer in layers(model).values() for key in layer.layout)
    assert_same_logits(logits(model), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gpu(name: str, folder_of: Callable[[str], Folder]) -> None:
    folder = folder_of(name)
    model = from_pretrained(auto_class(name), folder.path, device_map="cuda")
    for layer_name, layer in layers(model).items():
        assert layer.decode().is_cuda
        assert torch.equal(layer.decode().cpu(), folder.codes[layer_name].decode())
    expected = logits(from_pretrained(auto_class(name), folder.decoded))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS.cuda())[0].cpu(), expected, rtol=1e-3, atol=1e-3)


def test_disk_offload(folder_of: Callable[[str], Folder], tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    folder = folder_of("llama")
    device_map = {"model": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
    device_map = {k: v for k, v in device_map.items() if k != "model"} | {
        f"model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb", "layers.0")
    }
    arguments: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    if not V5:  # its offload index casts every tensor to the model's dtype
        with pytest.raises(CheckpointError, match="disk"):
            from_pretrained(auto_class("llama"), folder.path, **arguments)
        return
    model = from_pretrained(auto_class("llama"), folder.path, torch.bfloat16, **arguments)
    assert_same_logits(logits(model), logits(from_pretrained(auto_class("llama"), folder.path, torch.bfloat16)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_base_model_from_a_task_checkpoint(name: str, folder_of: Callable[[str], Folder]) -> None:
    folder = folder_of(name)
    model = from_pretrained(transformers.AutoModel, folder.path)
    assert layers(model).keys() == folder.codes.keys()
    assert_same_logits(logits(model), logits(from_pretrained(transformers.AutoModel, folder.decoded)))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral"])
def test_task_model_from_a_base_checkpoint(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    task = MODELS[name]()
    getattr(task, task.base_model_prefix).save_pretrained(tmp_path / "plain")
    folder = tiny.compress(tmp_path / "plain", tmp_path)
    model = from_pretrained(auto_class(name), folder.path)
    assert layers(model).keys() == folder.codes.keys()
    base = from_pretrained(transformers.AutoModel, folder.decoded)
    assert_same_logits(logits(getattr(model, model.base_model_prefix)), logits(base))


def test_an_untied_head_can_be_compressed(tmp_path: Any) -> None:
    folder = tiny.build("llama", tmp_path, keep=("embed", "norm"))
    assert "lm_head" in folder.codes
    model = from_pretrained(auto_class("llama"), folder.path)
    assert isinstance(model.lm_head, FeatherLinear)
    assert_same_logits(logits(model), logits(from_pretrained(auto_class("llama"), folder.decoded)))
    base = from_pretrained(transformers.AutoModel, folder.path)  # has no head: the rest still loads
    assert layers(base).keys() == folder.codes.keys() - {"lm_head"}


def test_a_tied_head_is_refused(tmp_path: Any) -> None:
    folder = tiny.build("llama", tmp_path, keep=("embed", "norm"))
    folder.rewrite(tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="'lm_head'.*tied"):
        from_pretrained(auto_class("llama"), folder.path)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_compressed_in_part(name: str, tmp_path: Any) -> None:
    keep = (*tiny.KEEP, "experts.1.", "0.mlp.experts.2.up_proj", "layers.1.mlp.experts", "layers.1.block_sparse_moe")
    folder = tiny.build(name, tmp_path, keep=keep)
    model = from_pretrained(auto_class(name), folder.path)
    assert layers(model).keys() == folder.codes.keys()
    assert_same_logits(logits(model), logits(from_pretrained(auto_class(name), folder.decoded)))
    model.save_pretrained(tmp_path / "again")
    again, first = tiny.load_all(tmp_path / "again"), folder.tensors()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_routers_and_embeddings_can_be_compressed(name: str, tmp_path: Any) -> None:
    folder = tiny.build(name, tmp_path, keep=("lm_head", "norm"))
    assert any(n.endswith(".gate") for n in folder.codes)
    assert "model.embed_tokens" in folder.codes
    model = from_pretrained(auto_class(name), folder.path, torch.bfloat16)
    assert_stored(model, folder)
    assert_stored(model.to(torch.float32), folder)
    model = from_pretrained(auto_class(name), folder.path)
    decoded = from_pretrained(auto_class(name), folder.decoded)
    for got, expected in zip(
        *(m(TOKENS, output_router_logits=True).router_logits for m in (model, decoded)), strict=True
    ):
        assert torch.equal(got, expected)
    assert_same_logits(logits(model), logits(decoded))
    model.save_pretrained(tmp_path / "again")
    assert tiny.load_all(tmp_path / "again").keys() == folder.tensors().keys()


def test_generation_works(folder_of: Callable[[str], Folder]) -> None:
    folder = folder_of("llama")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    made = [
        from_pretrained(auto_class("llama"), path).generate(TOKENS, attention_mask=mask, **settings)
        for path in (folder.path, folder.decoded)
    ]
    assert torch.equal(*made)


def test_gradients_reach_the_layers_before(folder_of: Callable[[str], Folder]) -> None:
    model = from_pretrained(auto_class("llama"), folder_of("llama").path)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_load_is_one_call(folder_of: Callable[[str], Folder]) -> None:
    for name in ("llama", "bert"):
        folder = folder_of(name)
        model, tokenizer = featherweight.load(folder.path, dtype="float32", cache=True)
        assert tokenizer is None
        assert type(model).__name__ == folder.config["architectures"][0]
        assert not model.training
        plain, _ = featherweight.load(str(folder.decoded), dtype=torch.float32)
        assert_same_logits(logits(model), logits(plain))


def test_load_uses_the_dtype_of_the_config(folder_of: Callable[[str], Folder], tmp_path: Any) -> None:
    model, _ = featherweight.load(folder_of("llama").path, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert featherweight.load(tmp_path)[0].dtype == torch.bfloat16


def test_load_names_a_wrong_path(tmp_path: Any, fresh_llama: Folder) -> None:
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        featherweight.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        featherweight.load(tmp_path)
    with pytest.raises(CheckpointError, match="is not a model"):
        featherweight.load(fresh_llama.path / "config.json")
    (fresh_llama.path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(CheckpointError, match="header"):
        featherweight.load(fresh_llama.path)
    (fresh_llama.path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        featherweight.load(fresh_llama.path)
