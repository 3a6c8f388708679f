"""save_pretrained of a loaded model writes what was loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_folders import MODELS, V5, Folder, assert_same_logits, auto_class, from_pretrained, load_all, logits
from safetensors import safe_open

from featherweight.integrations.transformers import FeatherConfig
from featherweight.storage.checkpoint.format import FORMAT_VERSION, HASHES_KEY, VERSION_KEY

WRITES_METADATA = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 57)


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(next(iter(sorted(folder.glob("*.safetensors")))), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, dtype: torch.dtype, folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    folder = folder_of(name)
    model = from_pretrained(auto_class(name), folder.path, dtype)
    model.save_pretrained(tmp_path)
    first, again = folder.tensors(), load_all(tmp_path)
    assert again.keys() == first.keys()
    for key, tensor in first.items():
        compressed = key.rpartition(".")[0] in folder.codes and not key.endswith(".bias")
        expected = tensor if compressed else tensor.to(dtype)
        assert again[key].dtype == expected.dtype, key
        assert torch.equal(again[key], expected), key
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"] == folder.config["quantization_config"]
    assert_same_logits(logits(from_pretrained(auto_class(name), tmp_path, dtype)), logits(model))


@pytest.mark.skipif(not WRITES_METADATA, reason="transformers before 4.57 lets a quantizer write no metadata")
@pytest.mark.parametrize("name", MODELS)
def test_metadata_has_version_and_hashes(name: str, folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    from_pretrained(auto_class(name), folder_of(name).path).save_pretrained(tmp_path)
    written = metadata(tmp_path)
    assert written["format"] == "pt"
    assert written[VERSION_KEY] == str(FORMAT_VERSION)
    hashes = json.loads(written[HASHES_KEY])
    tensors = load_all(tmp_path)
    assert hashes.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert hashes[key] == hashlib.sha256(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())).hexdigest()


def test_a_sharded_save_loads(folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    folder = folder_of("qwen3-moe")
    model = from_pretrained(auto_class("qwen3-moe"), folder.path)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    first, again = folder.tensors(), load_all(tmp_path)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert_same_logits(logits(from_pretrained(auto_class("qwen3-moe"), tmp_path)), logits(model))


def test_a_base_model_round_trips(folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    model: Any = from_pretrained(transformers.AutoModel, folder_of("llama").path)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    names = set(FeatherConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"]).specs)
    assert {f"model.{name}" for name in names} == folder_of("llama").codes.keys()
    assert all(any(key.startswith(f"{name}.") for key in load_all(tmp_path)) for name in names)
    assert_same_logits(logits(from_pretrained(transformers.AutoModel, tmp_path)), expected)


@pytest.mark.skipif(not V5, reason="transformers 4.x has no fused experts of this kind")
def test_experts_saved_in_the_layout_of_the_model_load(folder_of: Callable[[str], Folder], tmp_path: Path) -> None:
    model = from_pretrained(auto_class("mixtral"), folder_of("mixtral").path)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(".mlp.experts." in key for key in load_all(tmp_path))
    assert_same_logits(logits(from_pretrained(auto_class("mixtral"), tmp_path)), logits(model))
