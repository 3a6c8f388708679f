"""One meaning of a model's name, and a sentence of its own for everything that is no model."""

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
from featherweight.storage.checkpoint.prefixes import unwrapped
from featherweight.storage.checkpoint.resolve import resolve
from models import make_tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("resolve") / "model", tokenizer=True)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def refused(model: str | Path, words: str) -> None:
    """The same sentence from Python's `load` and from whatever opens a checkpoint."""
    import featherweight

    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError) as loading:
        featherweight.load(model)
    assert str(loading.value) == str(caught.value)


def test_home_folder_and_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import featherweight

    monkeypatch.setenv("HOME", str(folder.parent))
    ids = torch.tensor([[3, 4, 5]])
    wanted = featherweight.load(folder)[0](ids).logits
    for name in ("~/model", folder / "model.safetensors", "~/model/model.safetensors"):
        with Checkpoint.open(name) as checkpoint:
            assert checkpoint.folder == folder
        assert torch.equal(featherweight.load(name)[0](ids).logits, wanted)
    refused("~/nothing", "there is no folder or file ~/nothing")
    refused("~no-such-user-here/model", "not a usable path")


def test_a_file_among_others_is_the_one_that_loads(folder: Path) -> None:
    import featherweight

    tensors = load_file(folder / "model.safetensors")
    other = {name: tensor * 2 if "mlp" in name else tensor for name, tensor in tensors.items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    weight = featherweight.load(folder / "other.safetensors")[0].model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, other["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_hub_ids(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    import featherweight

    asked: list[tuple[str, Any]] = []

    def found(model: str, **options: Any) -> str:
        asked.append((model, options["revision"]))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert resolve(name, revision="v1").folder == folder
    featherweight.load(name, revision="v1")
    assert asked == [(name, "v1")] * 2


def test_a_mistyped_path_is_not_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    refused(f"{folder.parent.name}/modle", "there is no modle in the folder")
    for name in ("weights.safetensors", "model.gguf", "./model", "a/b/c", str(folder / "nothing")):
        refused(name, "there is no folder or file")


def test_other_kinds_of_files(folder: Path) -> None:
    for name, words in {
        "model.gguf": "model.gguf is not a valid GGUF file",
        "model.bin": "model.bin is a pickle",
        "notes.txt": "notes.txt is not a model",
        "adapter_model.safetensors": "is a PEFT adapter",
    }.items():
        (folder / name).write_bytes(b"x")
        refused(folder / name, words)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    refused(folder, f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def test_folders_of_other_kinds(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "model.gguf")
    refused(folder, "is a GGUF file")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "model.gguf").rename(folder / "adapter_model.safetensors")
    refused(folder, "is a PEFT adapter")  # with a config.json beside it
    (folder / "config.json").rename(folder / "model_index.json")
    (folder / "adapter_config.json").unlink()
    refused(folder, "is a diffusers pipeline")
    (folder / "model_index.json").unlink()
    refused(folder, "has no config.json")


def split(folder: Path) -> dict[str, str]:
    """Two shards; the index."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    names, placed = list(tensors), {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    return placed


def index(folder: Path, placed: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": placed}))


def odd_folders(folder: Path) -> dict[str, str]:
    """Copies of a folder whose files are odd, with what is said of each."""
    said = {}

    def odd(name: str, words: str = "") -> Path:
        said[name] = words
        return Path(shutil.copytree(folder, folder.parent / name))

    split(odd("no-index"))
    (odd("one-file") / "model.safetensors").rename(folder.parent / "one-file" / "weights.safetensors")
    copy = odd("wrong-total")
    index(copy, split(copy))
    copy = odd("ghost", "places tensor 'ghost' in a shard that lacks it")
    placed = split(copy)
    index(copy, placed | {"ghost": placed["lm_head.weight"]})
    copy = odd("omitted")
    placed = split(copy)
    index(copy, {name: shard for name, shard in placed.items() if name != "lm_head.weight"})
    copy = odd("unnamed", "holds extra.safetensors, which model.safetensors.index.json does not name")
    index(copy, split(copy))
    save_file({"x": torch.ones(2)}, copy / "extra.safetensors", {"format": "pt"})
    copy = odd("both", "the single file is used")
    index(copy, split(copy))
    shutil.copy(folder / "model.safetensors", copy)
    return said


def test_odd_files_are_used_as_transformers_does(folder: Path) -> None:
    import featherweight
    from featherweight.errors import FeatherWarning

    ids = torch.tensor([[3, 4, 5]])
    wanted = featherweight.load(folder)[0](ids).logits
    for name, words in odd_folders(folder).items():
        with Checkpoint.open(folder.parent / name) as checkpoint:
            assert len(checkpoint.names) == 21
            notes = " ".join(checkpoint.notes)
            assert words in notes, name
            assert bool(words) == bool(notes), name
        if words:
            with pytest.warns(FeatherWarning, match=words):
                model, tokenizer = featherweight.load(folder.parent / name)
        else:
            model, tokenizer = featherweight.load(folder.parent / name)
        assert torch.equal(model(ids).logits, wanted), name
        assert tokenizer is not None


def test_links_made_for_a_model_go_with_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import tempfile

    import featherweight

    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model, _ = featherweight.load(folder)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    assert model.config.name_or_path == str(folder)
    del model
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_wrappers_prefixes() -> None:
    assert unwrapped(["module.a", "module.b"]) == {"module.a": "a", "module.b": "b"}
    assert unwrapped(["_orig_mod.module.a"]) == {"_orig_mod.module.a": "a"}
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # not all of them: no wrapper
    assert unwrapped(["h.0._orig_mod.w", "h.1.w"]) == {"h.0._orig_mod.w": "h.0.w", "h.1.w": "h.1.w"}
    with pytest.raises(CheckpointError, match="are one tensor"):
        unwrapped(["a._orig_mod.w", "a.w"])
