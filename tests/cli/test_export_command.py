"""`feather export` and `feather check`: tables, JSON, sentences, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from feather_command import feather, feather_here

from models import make_tiny


def test_export_says_what_becomes_of_tensors(compressed: Path, tmp_path: Path) -> None:
    out, about = tmp_path / "small.gguf", tmp_path / "about.json"
    done = feather_here("export", compressed, "--to", "gguf", "--out", out, "--json", about)
    assert done.code == 0, done.errors
    assert out.read_bytes()[:4] == b"GGUF"
    assert "Q8_0" in done.output
    assert "rounded" in done.output
    assert "2 trit-planes" in done.output
    written = json.loads(about.read_text())
    assert written["bytes"] == out.stat().st_size
    assert written["format"] == "gguf"
    assert {entry["fate"] for entry in written["tensors"]} == {"exact", "rounded"}
    assert all(entry["error"] < 0.01 for entry in written["tensors"])


def test_settings(compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "exact.gguf"
    done = feather_here("export", compressed, "--to", "gguf", "--out", out, "--set", "lossless=true", "name=mine", "-q")
    assert done.code == 0, done.errors
    assert done.errors == ""
    assert "rounded" not in done.output
    assert b"mine" in out.read_bytes()[:400]


def test_the_command_as_written(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = feather("export", llama, "--to", "gguf", "--out", out, "--json", "-")
    assert done.code == 0, done.errors
    assert json.loads(done.output)["file"] == str(out)


def test_check(compressed: Path, llama: Path) -> None:
    done = feather_here("check", compressed, "--target", "llama.cpp", "--tensor-parallel", "2")
    assert done.code == 0, done.errors
    assert done.output.startswith("llama.cpp: runs it; feather export ")
    assert "Q8_0, with other values: 2 trit-planes g128 decoded and rounded" in done.output
    assert "--split-mode row" in done.output
    plain = feather_here("check", llama, "--target", "llama.cpp", "--json", "-")
    assert plain.code == 0
    answer = json.loads(plain.output)
    assert answer["runs"] is True
    assert any("BF16, with the very same values" in reason for reason in answer["reasons"])


def test_check_of_what_does_not_run(tmp_path: Path) -> None:
    model = make_tiny("opt", tmp_path / "model", tokenizer=True)
    done = feather_here("check", model, "--target", "llama.cpp")
    assert done.code == 1
    assert "does not run it" in done.output
    assert "'opt', for which there is no GGUF here" in done.output
    assert done.sentence() == f"error: llama.cpp does not run {model}"
