"""Damage that only a hash finds: every way of loading a compressed model finds it, unless it is told not to look."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import make_model
from safetensors.torch import load_file, save_file

import featherweight
from damage import flip_bit
from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.decoder.model import NativeModel
from featherweight.storage.checkpoint import integrity
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.tasks.analyse.verify import verify

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hashes")
    source = make_model("llama", place / "source", torch.bfloat16, hidden_size=64, max_position_embeddings=64)
    featherweight.compress(source, "ptqtp", place / "out", threads=1)
    return place / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def by_load(folder: Path, **options: Any) -> Any:
    return featherweight.load(folder, **options)


def by_transformers(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def natively(folder: Path, **options: Any) -> Any:
    return NativeModel.open(folder, threads=1, **options)


WAYS = [by_load, by_transformers, natively]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("ending", [".trits", ".scales", "embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_flipped_bit_is_found_and_named(folder: Path, way: Callable[..., Any], ending: str) -> None:
    with SafetensorsFile.open(folder / WEIGHTS) as file:
        name = next(name for name in file.entries if name.endswith(ending))
    flip_bit(folder / WEIGHTS, name, byte=5)
    with pytest.raises(CheckpointError, match="do not match their hash, so the file is damaged") as caught:
        way(folder)
    assert name in str(caught.value)
    assert str(folder / WEIGHTS) in str(caught.value)
    assert not verify(folder).whole


@pytest.mark.parametrize("way", [by_load, natively], ids=lambda way: way.__name__)
def test_who_does_not_want_to_know_is_not_told(
    folder: Path, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(folder / WEIGHTS)
    way(folder, verify="never")
    monkeypatch.setenv("FEATHERWEIGHT_VERIFY", "never")
    way(folder)
    for always in (True, "always"):
        with pytest.raises(CheckpointError, match="do not match their hash"):
            way(folder, verify=always)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_large_models_are_read_twice_only_if_asked(
    folder: Path, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native decoder reads all of it anyway."""
    flip_bit(folder / WEIGHTS)
    monkeypatch.setattr(integrity, "LARGEST", 1000)
    if way is natively:
        with pytest.raises(CheckpointError, match="do not match their hash"):
            way(folder)
        return
    way(folder)
    monkeypatch.setenv("FEATHERWEIGHT_VERIFY", "always")
    with pytest.raises(CheckpointError, match="do not match their hash"):
        way(folder)


@pytest.mark.parametrize("way", [by_load, natively], ids=lambda way: way.__name__)
def test_an_unknown_choice_is_refused(folder: Path, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FeatherError, match="verify is 'sometimes', expected one of auto, always, never"):
        way(folder, verify="sometimes")
    monkeypatch.setenv("FEATHERWEIGHT_VERIFY", "yes")
    with pytest.raises(FeatherError, match="FEATHERWEIGHT_VERIFY is 'yes', expected one of"):
        way(folder)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_files_without_hashes_load(folder: Path, way: Callable[..., Any]) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    way(folder)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_tensor_is_compared(folder: Path, threads: int) -> None:
    with SafetensorsFile.open(folder / WEIGHTS) as file:
        names = list(file.entries)
    assert integrity.check_paths([folder / WEIGHTS], threads=threads) == len(names)
    for name in names:
        intact = (folder / WEIGHTS).read_bytes()
        flip_bit(folder / WEIGHTS, name)
        with pytest.raises(CheckpointError, match=f"tensor {name} do not match"):
            integrity.check_paths([folder / WEIGHTS], threads=threads)
        (folder / WEIGHTS).write_bytes(intact)
