"""The store of a run: what is found is what was kept, whatever happened to the file since."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.errors import CheckpointError, OutputError
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.storage.run.store import Store
from featherweight.system.files import read_object, to_json
from featherweight.tasks.compress.compression import compress
from outputs import Stop, assert_only_output, contents, stopping

RECORD: dict[str, Any] = {"name": "a", "error": 0.1, "b": [1, None, "ü"], "a": {"z": 1, "y": True}}
TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 5, dtype=torch.int32),
    "one": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


def same(found: dict[str, Tensor], kept: dict[str, Tensor]) -> bool:
    return found.keys() == kept.keys() and all(
        found[name].dtype == kept[name].dtype and torch.equal(found[name], kept[name]) for name in kept
    )


@pytest.mark.parametrize("key", ["layer-000001", "a/b", "experts.down_proj[3]", "ü %", "x" * 200])
def test_what_is_kept_is_found(store: Store, key: str) -> None:
    assert store.record(key) is None
    assert not store.has(key)
    store.keep(key, TENSORS, RECORD)
    assert store.record(key) == RECORD
    assert list(store.record(key) or {}) == list(RECORD)
    record, tensors = store.load(key)
    assert record == RECORD
    assert same(tensors, TENSORS)
    assert store.names() == [key]
    store.keep(key, {}, {})
    assert store.record(key) == {}
    assert store.tensors(key) == {}
    store.drop(key)
    store.drop(key)
    assert not store.has(key)
    with pytest.raises(CheckpointError):
        store.load(key)


def test_keys_are_found_by_how_they_begin(store: Store) -> None:
    for key in ("b-2", "a-1", "b-1", "b"):
        store.keep(key, {}, {"key": key})
    assert store.names("b-") == ["b-1", "b-2"]
    assert store.names() == ["a-1", "b", "b-1", "b-2"]
    assert store.nbytes == sum(path.stat().st_size for path in store.folder.iterdir())


@pytest.mark.parametrize("key", ["", ".hidden", "x" * 300, "/" * 100])
def test_keys_that_cannot_name_a_file(store: Store, key: str) -> None:
    with pytest.raises(ValueError, match="no file can have its name"):
        store.keep(key, {}, {})


def test_no_changed_byte_goes_unnoticed(store: Store) -> None:
    """Of every byte of the file one bit is changed: what is still found is what was kept."""
    store.keep("key", TENSORS, RECORD)
    good = store.path("key").read_bytes()
    for place in range(len(good)):
        store.path("key").write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        found = store.record("key")
        if found is None:
            assert not store.has("key"), "what is damaged is removed"
        else:  # a blank, or a word of the header that says nothing about the content
            assert found == RECORD
            assert same(store.tensors("key"), TENSORS)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_files_cut_short_count_for_nothing(store: Store, length: int) -> None:
    store.keep("key", TENSORS, RECORD)
    os.truncate(store.path("key"), length if length >= 0 else store.path("key").stat().st_size + length)
    assert store.record("key") is None


def test_the_artifact_of_another_key_is_not_taken_for_it(store: Store) -> None:
    store.keep("one", TENSORS, RECORD)
    store.keep("two", TENSORS, RECORD)
    os.replace(store.path("one"), store.path("two"))
    assert store.record("two") is None


def test_what_fails_leaves_the_former_artifact(store: Store) -> None:
    store.keep("key", TENSORS, RECORD)
    with pytest.raises(TypeError):
        store.keep("key", {}, {"error": object()})
    store.path("key").with_name("key.safetensors.part").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        store.keep("key", {}, {})
    assert store.record("key") == RECORD
    assert store.names() == ["key"]


# Run folders of other versions.


def older_run(out: Path, identity: dict[str, Any], layers: int) -> None:
    """As versions before the store left it: the identity alone in run.json, and a folder for each kind of artifact."""
    folder = out.with_name(out.name + RUN_SUFFIX)
    for name in ("artifacts", "changed", "verdicts", "training", "out"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text(to_json(identity))
    (folder / "lock").touch()
    (folder / "verdicts" / "rounding.json").write_text('{"kept": true}')
    for number in range(layers):
        path = folder / "artifacts" / f"{number:06d}.safetensors"
        write_safetensors(path, [blob_of("weight", torch.zeros(2))], {"featherweight.layer": "{}"})


def test_a_run_of_an_older_version(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "expected" / "out", threads=1)
    expected = contents(tmp_path / "expected" / "out")
    identity = read_object(tmp_path / "expected" / "out" / "featherweight.json")["identity"]
    out = tmp_path / "made" / "out"
    older_run(out, identity, 3)
    held = contents(out.parent)
    with pytest.raises(OutputError, match=r"another version of featherweight is in .*discard it with --overwrite"):
        compress(llama, "rtn-4", out, threads=1)
    assert contents(out.parent) == held
    assert compress(llama, "rtn-4", out, threads=1, overwrite=True).resumed == 0
    assert_only_output(out, expected)


def test_an_older_run_that_finished_nothing_stands_in_nobodys_way(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    older_run(out, {"source": "?"}, 0)
    assert compress(llama, "rtn-4", out, threads=1).resumed == 0
    assert not out.with_name(out.name + RUN_SUFFIX).exists()


def test_what_is_left_of_a_removed_folder_is_recognised(llama: Path, tmp_path: Path) -> None:
    """Without run.json only what is ours in every file counts as left behind."""
    out = tmp_path / "out"
    folder = out.with_name(out.name + RUN_SUFFIX)
    with pytest.raises(Stop):
        compress(llama, "rtn-4", out, threads=1, observer=stopping("layer", 3))
    (folder / "run.json").unlink()
    (folder / "claims" / "layer-000001.lock").touch()
    (folder / "claims" / "mine.lock").write_text("a note")
    with pytest.raises(OutputError, match="holds claims, which featherweight did not write"):
        compress(llama, "rtn-4", out, threads=1)
    (folder / "claims" / "mine.lock").unlink()
    assert compress(llama, "rtn-4", out, threads=1).resumed == 0
