"""Folders, shards and the hub: what is read, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import INDEX_NAME, Checkpoint

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensor(seed: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | values))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = write_config(tmp_path / "single")
    save_file({"b": tensor(0), "a": tensor(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_config(tmp_path / "sharded")
    save_file({"a": tensor(0), "b": tensor(1)}, folder / FIRST)
    save_file({"c": tensor(2)}, folder / SECOND)
    set_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND})
    return folder


def set_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(model: str | Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(model)
    assert "\n" not in str(caught.value)


def test_single(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.total_bytes == 2 * 24 * 2
        assert checkpoint.parameters == 48
        assert checkpoint.quantization_config is None
        for name, expected in load_file(single / "model.safetensors").items():
            assert checkpoint.tensor(name).equal(expected)
            assert checkpoint.rows(name, 1, 3).equal(expected[1:3])
            assert checkpoint.entry(name).shape == (4, 6)
            assert b"".join(checkpoint.raw_windows(name)) == bytes(expected.view(torch.uint8).numpy())
            checkpoint.release(name, 0, 2)


def test_sharded_in_file_order(sharded: Path) -> None:
    with Checkpoint.open(str(sharded)) as checkpoint:
        assert checkpoint.names == ("a", "b", "c")
        assert checkpoint.file_of("c").path.name == SECOND
        assert checkpoint.tensor("c").equal(tensor(2))
        assert checkpoint.has("c")
        assert not checkpoint.has("d")
        with pytest.raises(CheckpointError, match="no tensor 'd'"):
            checkpoint.tensor("d")


def test_other_name_and_file_path(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    for model in (single, single / "weights.safetensors"):
        with Checkpoint.open(model) as checkpoint:
            assert set(checkpoint.names) == {"a", "b"}


def test_identity(single: Path, tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        with Checkpoint.open(folder) as checkpoint:
            return checkpoint.identity()

    first = identity(single)
    assert first == identity(Path(shutil.copytree(single, tmp_path / "copy")))
    write_config(single, vocab_size=3)
    second = identity(single)
    save_file({"b": tensor(0), "c": tensor(1)}, single / "model.safetensors")
    assert len({first, second, identity(single)}) == 3


def test_other_files(single: Path) -> None:
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_x.py"]
    kept += ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3"]
    left = [
        "README.md",
        ".hidden.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    left += ["model.onnx", "tf_model.h5", "model.gguf", "picture.png"]
    for name in kept + left:
        (single / name).write_text("{}")
    (single / "onnx").mkdir()
    with Checkpoint.open(single) as checkpoint:
        assert [path.name for path in checkpoint.other_files()] == sorted(kept)


def test_quantization_config(single: Path) -> None:
    write_config(single, quantization_config={"quant_method": "gptq"})
    with Checkpoint.open(single) as checkpoint:
        assert checkpoint.quantization_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere/", "", "a\0b", "x" * 5000])
def test_neither_path_nor_hub_id(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(model, "hub id|config.json")


def test_config_errors(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json")
    for content in (b"{", b"\xff\xfe", b"[1]", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        save_file({"a": tensor(0)}, tmp_path / "model.safetensors")
        refused(tmp_path, "config.json (is not valid JSON|must hold a JSON object)")


def test_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "PEFT adapter")


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    refused(tmp_path, "no weights")
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path, "no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path, f"{name} is a pickle.*safe_serialization")
    refused(tmp_path / name, f"{name} is a pickle")


def test_not_a_model_file(single: Path) -> None:
    refused(single / "config.json", "is not a model")


def test_several_files_without_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    with Checkpoint.open(sharded) as checkpoint:  # a whole set by its numbers
        assert checkpoint.names == ("a", "b", "c")
    (sharded / SECOND).rename(sharded / "second.safetensors")
    refused(sharded, "2 safetensors files but no model.safetensors.index.json")


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, f"lacks the shard {SECOND}")


def test_index_lists_what_shard_lacks(sharded: Path) -> None:
    set_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    with Checkpoint.open(sharded) as checkpoint:  # the files say what there is, as in transformers
        assert checkpoint.names == ("a", "b", "c")
        assert "places tensor 'd' in a shard that lacks it" in checkpoint.notes[0]


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": tensor(2), "a": tensor(3)}, sharded / SECOND)
    with Checkpoint.open(sharded) as checkpoint:  # the later one counts, as in transformers
        assert checkpoint.tensor("a").equal(tensor(3))
        assert f"tensor 'a' is in two shards of {sharded}: that in {SECOND} is used" in checkpoint.notes[0]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "model.bin", "a\0.safetensors"])
def test_hostile_shard_names(sharded: Path, shard: str) -> None:
    set_index(sharded, {"a": shard})
    refused(sharded, "not a safetensors file in the same folder")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_hostile_weight_maps(sharded: Path, weight_map: Any) -> None:
    set_index(sharded, weight_map)
    refused(sharded, "no weight_map")


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / SECOND
    path.write_bytes(path.read_bytes()[:-7])
    refused(sharded, f"{SECOND} is not a valid safetensors file: it is truncated, 7 bytes")


def hub_errors() -> list[tuple[Exception, str]]:
    from huggingface_hub import errors

    def made(kind: type[Exception]) -> Exception:
        error = kind.__new__(kind)  # their constructors want an HTTP response
        Exception.__init__(error, "server says no")
        return error

    return [
        (made(errors.GatedRepoError), "is gated: accept its terms"),
        (made(errors.RepositoryNotFoundError), "neither a local folder nor a public model"),
        (made(errors.RevisionNotFoundError), "has no revision 'v1'"),
        (made(errors.LocalEntryNotFoundError), "hub cannot be reached"),
        (made(errors.OfflineModeIsEnabled), "hub cannot be reached"),
        (made(errors.HFValidationError), "valid hub id"),
        (ConnectionError("refused"), "cannot download"),
        (OSError(28, "No space left on device"), "No space left"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_hub_errors(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    error, words = hub_errors()[number]

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open("owner/name", revision="v1")


def test_hub_download(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def found(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(single)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    with Checkpoint.open("owner/name", revision="v1", token="secret") as checkpoint:
        assert checkpoint.folder == single
    assert (asked["model"], asked["revision"], asked["token"]) == ("owner/name", "v1", "secret")
    wanted = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "LICENSE",
    ]
    unwanted = [
        "pytorch_model.bin",
        "onnx/model.safetensors",
        "consolidated.safetensors",
        "model.gguf",
        "x/config.json",
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_local_folder_wins_over_hub(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single.parent)
    with Checkpoint.open("single") as checkpoint:
        assert checkpoint.parameters == 48
