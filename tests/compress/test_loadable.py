"""A data-free recipe says where transformers will not load what it writes, and does not ask where all is usual."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from featherweight import compress
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.loadable import loading_note
from models import FAMILIES, make_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path / "model", torch.float32)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_position_embeddings": 512.0},
        {"tie_word_embeddings": None},
        {"rms_norm_eps": "1e-05"},
        {"torch_dtype": "torch.bfloat16", "dtype": None},
        {"torch_dtype": "auto", "dtype": None},
        {"rope_scaling": {"type": "nonsense", "factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_theta": "1e4"},
        {"num_hidden_layers": "2"},
        {"hidden_size": None},
        {"model_type": 3},
    ],
    ids=str,
)
def test_what_transformers_refuses_is_said(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    change(folder, **settings)
    try:
        transformers.AutoConfig.from_pretrained(folder)
        refused = False
    except Exception:
        refused = True
    with Checkpoint.open(folder) as checkpoint:
        note = loading_note(checkpoint)
    assert (note is not None) is refused
    if note is not None:
        assert "transformers cannot read this config.json" in note
        assert "\n" not in note


def test_the_note_is_told_and_the_output_is_made(folder: Path, tmp_path: Path) -> None:
    change(folder, max_position_embeddings=[512])
    told: list[dict[str, Any]] = []
    done = compress(folder, "rtn-8", tmp_path / "out", observer=told.append)
    notes = [event["text"] for event in told if event["event"] == "note"]
    try:
        transformers.AutoConfig.from_pretrained(folder)
    except Exception:
        assert [n for n in notes if "will not load it before that is corrected" in n]
    assert done.layers


def test_usual_configurations_do_not_import_transformers(tmp_path: Path) -> None:
    folders = [str(make_tiny(family, tmp_path / family)) for family in FAMILIES]
    program = (
        "import sys\nfrom featherweight.storage.checkpoint.checkpoint import Checkpoint\n"
        "from featherweight.tasks.compress.loadable import loading_note\n"
        "for folder in sys.argv[1:]:\n"
        "    with Checkpoint.open(folder) as checkpoint:\n"
        "        assert loading_note(checkpoint) is None, folder\n"
        "        assert 'transformers' not in sys.modules, folder\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
