"""What cannot be run is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import make_model, some_tokens
from safetensors.torch import load_file, save_file

from featherweight import compress
from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from models import make_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """None removes a tensor; names are written with two underscores for a dot."""
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3-moe", "gemma2", "phi3", "bert"])
def test_other_families(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="does not know the model type"):
        NativeModel.open(make_tiny(family, tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "runs LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": ["llama"]}, "does not know the model type"),
    ],
    ids=str,
)
def test_models_that_compute_something_else(folder: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        NativeModel.open(change(folder, **settings))


def test_tensors_that_play_no_part(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        NativeModel.open(change_tensors(folder, model__layers__0__self_attn__q_norm__weight=torch.ones(16)))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 96},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rms_norm_eps": "small"},
        {"vocab_size": 257},
        {"num_hidden_layers": 3},
        {"max_position_embeddings": None},
    ],
    ids=str,
)
def test_configs_that_do_not_fit_the_weights(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        NativeModel.open(change(folder, **settings))


def test_fewer_layers_than_there_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1"):
        NativeModel.open(change(folder, num_hidden_layers=1))


@pytest.mark.parametrize("name", ["model__norm__weight", "lm_head__weight", "model__layers__1__mlp__up_proj__weight"])
def test_missing_and_misshapen_tensors(folder: Path, name: str) -> None:
    dotted = name.replace("__", ".").replace(".weight", "")
    for tensor in (None, torch.ones(3, 5), torch.ones(64, dtype=torch.int64)):
        with pytest.raises(CheckpointError, match=dotted.replace(".", r"\.")):
            NativeModel.open(change_tensors(folder, **{name: tensor}))


def test_damaged_codes(folder: Path, tmp_path: Path) -> None:
    compress(folder, "ptqtp", tmp_path / "out", threads=1)
    change_tensors(
        tmp_path / "out", model__layers__0__mlp__up_proj__trits=torch.full((2, 1639), 255, dtype=torch.uint8)
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj.*damaged"):
        NativeModel.open(tmp_path / "out")


@pytest.fixture(scope="module")
def model(plain: Path) -> NativeModel:
    return NativeModel.open(plain, threads=1)


@pytest.mark.parametrize("tokens", [[256], [5, -1, 7], [1 << 40]], ids=str)
def test_tokens_out_of_range(model: NativeModel, tokens: list[int]) -> None:
    for run in (model.generate, model.forward, model.feed):
        with pytest.raises(FeatherError, match=rf"no token {max(tokens, key=abs) if tokens[0] != 5 else -1}"):
            run(tokens)
    with pytest.raises(FeatherError, match="there is no token"):
        model.step({0: tokens[-1] if tokens[0] != 5 else -1})


def test_prompts_that_do_not_fit(model: NativeModel) -> None:
    for run in (model.generate, model.forward):
        with pytest.raises(FeatherError, match="129 tokens do not fit the context of 128"):
            run(some_tokens(129))
        with pytest.raises(FeatherError, match="the prompt is empty"):
            run([])
    model.reset()
    model.feed(some_tokens(100))
    with pytest.raises(FeatherError, match="130 tokens do not fit"):
        model.feed(some_tokens(30))
    model.feed(some_tokens(28))
    with pytest.raises(FeatherError, match="129 tokens do not fit"):
        model.step({0: 5})
    assert model.length() == 128
    assert len(model.generate(some_tokens(128), 10, stops=())) == 1


def test_calls_that_make_no_sense(plain: Path, model: NativeModel) -> None:
    for settings in ({"kv_cache": "int4"}, {"precision": "bfloat16"}, {"context": 0}):
        with pytest.raises(FeatherError, match=next(iter(settings))):
            NativeModel.open(plain, **settings)  # type: ignore[arg-type]
    with pytest.raises(FeatherError, match="max_new_tokens"):
        model.generate([1], 0)
    with pytest.raises(FeatherError, match="0 prompts"):
        model.generate_batch([])
    with pytest.raises(FeatherError, match="samplings"):
        model.generate_batch([[1], [2]], sampling=[])
    with pytest.raises(FeatherError, match="no sequence 64"):
        model.feed([1], 64)


def test_weights_that_give_no_numbers(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.full((64,), float("nan")))
    with pytest.raises(FeatherError, match="not a number"):
        NativeModel.open(folder, threads=1).generate([1, 2, 3], 5)


@pytest.mark.parametrize("part", ["k", "v"])
def test_keys_and_values_beyond_half_precision(folder: Path, part: str) -> None:
    """They are refused, never stored as the largest number there is; a cache with scales holds them."""
    name = f"model.layers.1.self_attn.{part}_proj.weight"
    large = load_file(folder / "model.safetensors")[name].float() * 1e6
    change_tensors(folder, **{name.replace(".", "__"): large.bfloat16()})
    half = NativeModel.open(folder, threads=1, kv_cache="float16")
    for _ in range(2):  # the refused tokens are not in the cache
        with pytest.raises(FeatherError, match="beyond 65504.*kv_cache='int8'"):
            half.forward([1, 2, 3])
    with pytest.raises(FeatherError, match="beyond 65504"):
        half.generate([1, 2, 3], 5)
    assert half.length() == 0
    assert NativeModel.open(folder, threads=1, kv_cache="int8").forward([1, 2, 3]).isfinite().all()


def test_without_the_native_library(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    with pytest.raises(UnsupportedModelError, match="native library"):
        NativeModel.open(plain)
