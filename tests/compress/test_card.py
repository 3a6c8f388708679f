"""The model card: what the hub reads of it, and how to load the model in each program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import featherweight
from models import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("card")
    model = make_tiny("llama", place / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/some-model"}))
    return featherweight.compress(model, "rtn-4", place / "out").out


def test_the_hub_reads_it(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["featherweight", "quantized"]
    assert data["pipeline_tag"] == "text-generation"
    assert (data["base_model"], data["base_model_relation"]) == ("someone/some-model", "quantized")


def test_it_names_version_recipe_and_programs(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    for said in (featherweight.__version__, "`rtn-4`", "feather chat .", "vllm serve .", "--to gguf", "feather eval ."):
        assert said in text


def test_a_path_is_no_base_model(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/model"}))
    featherweight.compress(model, "rtn-4", tmp_path / "out")
    assert "base_model" not in ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
