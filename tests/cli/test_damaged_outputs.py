"""Outputs that are damaged or of a newer release, looked at by `inspect` and `verify`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here
from test_bad_input import broken_config, hostile_length, no_config, no_weights, truncated_shard

from damage import flip_bit
from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.size import measure_size
from featherweight.tasks.analyse.verify import verify


def test_verify_finds_a_flipped_bit_in_every_tensor(compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    path = folder / "model.safetensors"
    with SafetensorsFile.open(path) as file:
        entries = dict(file.entries)
    content = path.read_bytes()
    chance = random.Random(3)
    for name, entry in entries.items():
        spoiled = bytearray(content)
        spoiled[entry.start + chance.randrange(entry.nbytes)] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled)
        assert verify(folder).problems == [f"{path}: the bytes of tensor {name} do not match their hash"]
    outcome = feather_here("verify", folder)
    assert "is damaged: 1 problem(s)" in outcome.last_sentence()
    assert f"tensor {name} do not match their hash" in outcome.errors
    path.write_bytes(content)
    assert feather_here("verify", folder).code == 0


def test_verify_finds_a_flipped_bit_in_the_header(compressed: Path, tmp_path: Path) -> None:
    """A header that still can be read must not pass for whole."""
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    metadata = content.index(b"}", content.index(b"__metadata__"))
    chance = random.Random(4)
    places = [*range(8, 300), *(chance.randrange(8, length) for _ in range(300)), *range(metadata - 3, metadata + 60)]
    unnoticed = []
    for place in places:
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << chance.randrange(8)
        path.write_bytes(spoiled)
        try:
            if verify(folder).whole:
                unnoticed.append((place, content[place - 20 : place + 20]))
        except CheckpointError:
            pass
    assert unnoticed == []


def test_inspect_and_verify_of_damaged_folders(compressed: Path, tmp_path: Path) -> None:
    for number, spoil in enumerate((truncated_shard, hostile_length, no_weights, broken_config, no_config)):
        folder = Path(shutil.copytree(compressed, tmp_path / f"folder-{number}"))
        spoil(folder)
        for command in ("inspect", "verify"):
            assert str(folder) in feather_here(command, folder).sentence()


CODES: list[Any] = [
    {"kind": "nonsense"},
    {"planes": 0},
    {"group_size": "many"},
    {"kind": None},
    {"planes": None},
    {"tied": None, "planes": 2.5},
]


@pytest.mark.parametrize("change", CODES, ids=str)
def test_inspect_and_verify_of_a_malformed_code(compressed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codes"][0]["code"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    feather_here("inspect", folder).sentence()
    feather_here("verify", folder).last_sentence()


def test_a_kind_of_code_from_a_newer_release(compressed: Path, tmp_path: Path) -> None:
    """Each command says what and where, and to update; `verify` still checks the bytes of everything else."""
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    codes = config["quantization_config"]["codes"]
    codes[0]["code"]["kind"] = "new-kind"
    module = next(iter(codes[0]["modules"]))
    (folder / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "eval"):
        said = feather_here(command, folder).last_sentence()
        assert all(word in said for word in ("'new-kind'", module, "update featherweight")), said
    with pytest.raises(CheckpointError, match="'new-kind'.*update featherweight"):
        measure_size(folder)
    said = feather_here("verify", folder)
    assert "made by a newer featherweight" in said.last_sentence()
    assert "damaged" not in said.errors
    flip_bit(folder / "model.safetensors")
    assert "is damaged: 2 problem(s)" in feather_here("verify", folder).last_sentence()
    found = verify(folder).problems
    assert any("new-kind" in problem and module in problem for problem in found)
    assert any("do not match their hash" in problem for problem in found)


@pytest.mark.parametrize("codes", [None, 3, [1], [{"modules": []}], [{"code": {}, "modules": {"a": 1}}]], ids=str)
def test_malformed_lists_of_codes(compressed: Path, tmp_path: Path, codes: Any) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["codes"] = codes
    (folder / "config.json").write_text(json.dumps(config))
    feather_here("inspect", folder).sentence()
    feather_here("verify", folder).last_sentence()
    feather_here("eval", folder).last_sentence()


@pytest.mark.parametrize("manifest", ["", "[]", '{"identity": 1, "layers": 3}', '{"identity": 1, "layers": [{}]}'])
def test_inspect_with_a_damaged_manifest(compressed: Path, tmp_path: Path, manifest: str) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "folder"))
    (folder / "featherweight.json").write_text(manifest)
    outcome = feather_here("inspect", folder)
    if outcome.code:
        outcome.sentence()
