"""A folder that brings the code of its own class: it runs when that is allowed, and a sentence says how to allow it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight.errors import CheckpointError
from models import make_tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_kind"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A llama, and the same weights with a class of their own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    plain = make_tiny("llama", tmp_path / "plain", torch.float32, tokenizer=True)
    own = Path(shutil.copytree(plain, tmp_path / "own"))
    (own / "custom_code.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "custom_code.OwnConfig", "AutoModelForCausalLM": "custom_code.OwnForCausalLM"}
    config |= {"model_type": "own_kind", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (own / "config.json").write_text(json.dumps(config))
    return plain, own


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 4, 5]])).logits
    return found


def test_load(folders: tuple[Path, Path]) -> None:
    plain, own = folders
    with pytest.raises(CheckpointError, match=r"brings the code of its own .*--trust-remote-code"):
        featherweight.load(own)
    model, tokenizer = featherweight.load(own, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert tokenizer is not None
    assert torch.allclose(logits(model), 2 * logits(featherweight.load(plain)[0]))


@pytest.mark.parametrize("recipe", ["rtn-8", "gptq"])
def test_compress_and_evaluate(folders: tuple[Path, Path], tmp_path: Path, recipe: str) -> None:
    _, own = folders
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12)
    notes: list[str] = []
    options: dict[str, Any] = {"observer": lambda event: notes.append(event.get("text", ""))}
    if recipe == "gptq":
        options |= {"calibration": text, "changes": ["calibration.sequences=4", "calibration.length=32"]}
    out = tmp_path / "out"
    featherweight.compress(own, recipe, out, trust_remote_code=True, **options)
    assert not [note for note in notes if "nobody checked" in note]
    result = featherweight.evaluate(out, own, text=text, context=32, trust_remote_code=True)
    assert result.divergence is not None
    assert result.divergence.mean < 0.01
    assert (out / "custom_code.py").is_file()


def test_without_it_a_data_free_run_says_what_nobody_checked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    notes: list[str] = []
    featherweight.compress(folders[1], "rtn-8", tmp_path / "out", observer=lambda e: notes.append(e.get("text", "")))
    assert any("only --trust-remote-code runs, so nobody checked" in note for note in notes)


def test_the_commands_say_it() -> None:
    from typer.testing import CliRunner

    from featherweight.cli.main import app

    for command in ("compress", "calibrate", "plan", "eval", "generate", "chat", "bench"):
        shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [command, "--help"])
        assert "--trust-remote-code" in shown.output, command
