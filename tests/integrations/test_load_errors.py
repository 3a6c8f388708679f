"""Folders that cannot be loaded as they are: one clear error each, never a silently random weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from compressed_folders import Folder
from safetensors.torch import save_file

from featherweight.errors import CheckpointError
from featherweight.model.layers.modules import FeatherLinear

LAYER = "model.layers.1.self_attn.q_proj"


def load(folder: Folder) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder.path)


def change_tensors(folder: Folder, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = folder.tensors()
    change(tensors)
    save_file(tensors, folder.path / "model.safetensors", {"format": "pt"})


def change_modules(folder: Folder, change: Callable[[dict[str, list[int]]], Any]) -> None:
    config = folder.config["quantization_config"]
    for entry in config["codes"]:
        if LAYER in entry["modules"]:
            change(entry["modules"])
    folder.rewrite(quantization_config=config)


@pytest.mark.parametrize("key", ["scales", "bias", "codes", "trits", "weight"])
def test_a_missing_tensor_is_named(fresh_llama: Folder, key: str) -> None:
    name = next(k for k in fresh_llama.tensors() if k.rpartition(".")[0] in fresh_llama.codes and k.endswith(key))
    change_tensors(fresh_llama, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(fresh_llama)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_plain_tensor_is_named(fresh_llama: Folder, name: str) -> None:
    """transformers alone would make it up."""
    change_tensors(fresh_llama, lambda tensors: tensors.pop(name))
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(CheckpointError, match=f"lack '(model.)?{name.removeprefix('model.')}'"):
            kind.from_pretrained(fresh_llama.path)


def test_a_head_to_be_trained_is_made(fresh_llama: Folder) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(fresh_llama.path)
    assert model.score.weight.shape[1] == fresh_llama.config["hidden_size"]


def test_a_tensor_of_another_shape_is_named(fresh_llama: Folder) -> None:
    name = next(k for k in fresh_llama.tensors() if k.endswith(".scales"))
    change_tensors(fresh_llama, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=name):
        load(fresh_llama)


@pytest.mark.parametrize(("key", "dtype"), [(".scales", torch.uint8), (".trits", torch.float32)])
def test_a_tensor_of_another_dtype_is_named(fresh_llama: Folder, key: str, dtype: torch.dtype) -> None:
    name = next(k for k in fresh_llama.tensors() if k.endswith(key))
    change_tensors(fresh_llama, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=name):
        load(fresh_llama)


def test_a_module_the_model_lacks_is_named(fresh_llama: Folder) -> None:
    extra = "model.layers.7.self_attn.q_proj"
    change_modules(fresh_llama, lambda modules: modules.update({extra: modules[LAYER]}))
    change_tensors(
        fresh_llama,
        lambda tensors: tensors.update(
            {extra + k.removeprefix(LAYER): v.clone() for k, v in tensors.items() if k.startswith(LAYER)}
        ),
    )
    with pytest.raises(CheckpointError, match=rf"{extra}.*LlamaForCausalLM"):
        load(fresh_llama)


def test_a_module_of_another_shape_is_named(fresh_llama: Folder) -> None:
    folder = fresh_llama.config
    folder["hidden_size"], folder["head_dim"] = 96, 12
    fresh_llama.rewrite(**folder)
    with pytest.raises(CheckpointError, match=r"down_proj.* \[48, 80\] .* \[96, 80\] "):
        load(fresh_llama)


def test_a_module_without_a_matrix_is_named(fresh_llama: Folder) -> None:
    config = fresh_llama.config["quantization_config"]
    config["codes"].append({"code": {"kind": "dense", "dtype": "float32"}, "modules": {"model.norm": [48, 48]}})
    fresh_llama.rewrite(quantization_config=config)
    with pytest.raises(CheckpointError, match=r"model\.norm.*LlamaRMSNorm"):
        load(fresh_llama)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"format_version": None},
        {"codes": {}},
        {"codes": [{"code": {"kind": "nonsense"}, "modules": {LAYER: [48, 48]}}]},
        {"codes": [{"code": {}, "modules": {LAYER: [48, 48]}}]},
        {"codes": [{"code": {"kind": "uniform", "bits": 99, "group_size": 4}, "modules": {LAYER: [48, 48]}}]},
        {"codes": [{"code": {"kind": "uniform", "bits": 4, "group_size": 4}, "modules": {LAYER: [48]}}]},
        {"codes": [{"code": {"kind": "uniform", "bits": 4, "group_size": 4}, "modules": {LAYER: 48}}]},
        {"codes": None},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_malformed_config_is_explained(fresh_llama: Folder, change: dict[str, Any]) -> None:
    fresh_llama.rewrite(quantization_config=fresh_llama.config["quantization_config"] | change)
    with pytest.raises(CheckpointError, match="quantization_config|weight files lack"):
        load(fresh_llama)


def test_compressing_while_loading_is_refused(fresh_llama: Folder) -> None:
    from featherweight.integrations.transformers import FeatherConfig

    config = FeatherConfig(**fresh_llama.config["quantization_config"])
    with pytest.raises(CheckpointError, match="feather compress"):
        transformers.AutoModelForCausalLM.from_pretrained(fresh_llama.decoded, quantization_config=config)


def test_the_weight_of_a_layer_cannot_be_replaced(fresh_llama: Folder) -> None:
    layer = next(m for m in load(fresh_llama).modules() if isinstance(m, FeatherLinear) and "codes" in m.layout)
    with pytest.raises(CheckpointError, match="cannot be assigned"):
        layer.weight = torch.nn.Parameter(torch.zeros(48, 48))


def test_load_state_dict_refuses_rounded_scales(fresh_llama: Folder) -> None:
    layer = next(m for m in load(fresh_llama).modules() if isinstance(m, FeatherLinear) and "codes" in m.layout)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.load_state_dict(state | {"scales": state["scales"].float()})
    assert layer.scales.dtype == torch.float16
    with pytest.raises(CheckpointError, match="scales"):
        layer.load_state_dict(state | {"scales": state["scales"].float() + 1e-6})


def test_damaged_bytes_are_noticed(fresh_llama: Folder) -> None:
    name = next(k for k in fresh_llama.tensors() if k.endswith(".trits"))
    change_tensors(fresh_llama, lambda tensors: tensors[name].fill_(255))  # no five trits pack to 255
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('.trits')}' is damaged"):
        load(fresh_llama)(torch.arange(3)[None])
