"""One network to everything that reads a folder: transformers, the native decoder, and what compression writes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.errors import FeatherWarning
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from models import make_tiny

IDS = list(range(3, 23))
DENSE = ("rtn-8", ["grid={kind: dense, dtype: float32}"])
"""A code that loses nothing: what differs between source and output is the network."""


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("one") / "model", torch.float32, tokenizer=True)


def changed(original: Path, out: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    folder = Path(shutil.copytree(original, out))
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def quietly(action: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatherWarning)
        return action()


def by_transformers(folder: Path) -> Tensor:
    model, _ = quietly(lambda: featherweight.load(folder, dtype="float32"))
    with torch.no_grad():
        found: Tensor = model(torch.tensor([IDS])).logits[0]
    return found


def natively(folder: Path) -> Tensor:
    return quietly(lambda: NativeModel.open(folder, threads=1, precision="float")).forward(IDS)


def same(one: Tensor, other: Tensor) -> bool:
    """Up to the float16 in which the decoder keeps keys and values; another head or bias is a hundred times as much."""
    return float((one - other).norm() / other.norm()) < 5e-3


def own_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * 0.05


def tied_copy(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def biases(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "proj" in name]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name])) * 0.1


CASES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "own head": (own_head, {"tie_word_embeddings": True}, "another one is stored: the stored one is used"),
    "copy of the embedding": (tied_copy, {"tie_word_embeddings": True}, ""),
    "biases nobody asks for": (biases, {}, "does not ask for"),
    "biases asked for": (biases, {"attention_bias": True, "mlp_bias": True}, ""),
    "module.": (lambda t: {f"module.{k}": v for k, v in t.items()}, {}, "carry a wrapper's prefix"),
    "_orig_mod.": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, {}, "carry a wrapper's prefix"),
    "base_model.model.": (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, {}, "carry a wrapper's prefix"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_engines_and_output_agree(original: Path, tmp_path: Path, case: str, calibrated: bool) -> None:
    change, config, words = CASES[case]
    folder = changed(original, tmp_path / "source", change, **config)
    notes: list[str] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    recipe, changes = DENSE
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    if calibrated:
        recipe, changes = "gptq", ["calibration.sequences=4", "calibration.length=32", "grid={kind: uniform, bits: 8}"]
    featherweight.compress(
        folder, recipe, tmp_path / "out", changes=changes, calibration=text if calibrated else None, observer=watch
    )
    assert words in " ".join(notes)
    source = by_transformers(folder)
    assert same(natively(folder), source)
    output = by_transformers(tmp_path / "out")
    assert same(natively(tmp_path / "out"), output)
    assert float((output - source).norm() / source.norm()) < (0.05 if calibrated else 5e-3)
    assert verify(tmp_path / "out").whole


@pytest.mark.parametrize("case", ["own head", "biases nobody asks for", "module."])
def test_what_is_odd_is_said_by_both_engines(original: Path, tmp_path: Path, case: str) -> None:
    change, config, words = CASES[case]
    folder = changed(original, tmp_path / "source", change, **config)
    with pytest.warns(FeatherWarning, match=words):
        featherweight.load(folder)
    with pytest.warns(FeatherWarning, match=words):
        NativeModel.open(folder, threads=1)


def test_the_output_says_whose_head_it_has(original: Path, tmp_path: Path) -> None:
    folder = changed(original, tmp_path / "source", own_head, tie_word_embeddings=True)
    featherweight.compress(folder, "rtn-8", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    folder = changed(original, tmp_path / "biased", biases)
    result = featherweight.compress(folder, "rtn-8", tmp_path / "plain")
    dropped = result.tensors["dropped"]
    assert set(dropped.values()) == {"LlamaForCausalLM does not ask for it"}
    with Checkpoint.open(tmp_path / "plain") as checkpoint:
        assert not [name for name in checkpoint.names if name.endswith(".bias")]
    assert len(dropped) == 14


def test_a_tied_embedding_stored_as_the_head_is_handed_over(original: Path, tmp_path: Path) -> None:
    folder = changed(
        original,
        tmp_path / "source",
        lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k},
        tie_word_embeddings=True,
    )
    with pytest.raises(UnsupportedModelError, match="tied embedding"):
        NativeModel.open(folder, threads=1)


def test_an_adapter_beside_a_whole_model(original: Path, tmp_path: Path) -> None:
    """Where peft is installed transformers would load it; an output with its config, but not its weights, is broken."""
    folder = Path(shutil.copytree(original, tmp_path / "source"))
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "a/b", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    notes: list[str] = []
    featherweight.compress(folder, "rtn-8", tmp_path / "out", observer=lambda e: notes.append(e.get("text", "")))
    assert any("holds an adapter beside a whole model: the model is used without it" in note for note in notes)
    assert not list((tmp_path / "out").glob("adapter*"))
    with pytest.warns(FeatherWarning, match="holds an adapter beside a whole model"):
        model, _ = featherweight.load(folder)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert same(by_transformers(folder), by_transformers(original))


def test_transformers_never_sees_the_adapter(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    folder = Path(shutil.copytree(original, tmp_path / "source"))
    (folder / "adapter_config.json").write_text("{}")
    seen: list[list[str]] = []
    load = transformers.LlamaForCausalLM.from_pretrained.__func__

    def watched(cls: Any, path: Any, *rest: Any, **options: Any) -> Any:
        if path is not None:
            seen.append(sorted(p.name for p in Path(path).iterdir()))
        return load(cls, path, *rest, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(watched))
    quietly(lambda: featherweight.load(folder))
    assert "model.safetensors" in seen[-1]
    assert not [name for name in seen[-1] if name.startswith("adapter")]
