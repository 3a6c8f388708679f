"""Exports that fail or are killed leave nothing that could be taken for a model, and replace nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest

import featherweight
from featherweight.errors import OutputError
from featherweight.interop.gguf_writing import writing
from models import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "model", tokenizer=True)


@pytest.mark.parametrize("tensors", [0, 3, 20])
def test_a_full_disk(model: Path, tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever tensor: one sentence, and nothing is there."""
    left = tensors
    pad = writing._pad

    def full(stream: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        pad(stream)

    monkeypatch.setattr(writing, "_pad", full)
    with pytest.raises(OutputError, match="the disk is full while writing .*out.gguf"):
        featherweight.export(model, "gguf", tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_is_full(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(OutputError, match="the disk is full while writing"):
            featherweight.export(model, "gguf", disk / "out.gguf")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs processes that can be killed")
def test_killed(model: Path, tmp_path: Path) -> None:
    """What is there has another name, and the next export takes it away."""
    out = tmp_path / "out.gguf"
    program = (
        "import sys, time, featherweight\n"
        "from featherweight.interop.gguf_writing import writing\n"
        "pad, seen = writing._pad, []\n"
        "def slow(stream):\n"
        "    pad(stream); seen.append(1)\n"
        "    if len(seen) == 9: print('now', flush=True); time.sleep(60)\n"
        "writing._pad = slow\n"
        "featherweight.export(sys.argv[1], 'gguf', sys.argv[2])\n"
    )
    source = str(Path(featherweight.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(model), str(out)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"now"
    process.kill()
    process.wait()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.part"]
    featherweight.export(model, "gguf", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert len(gguf.GGUFReader(out).tensors) == 21


def test_nothing_is_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError, match=r"out.gguf is there already: choose another name"):
        featherweight.export(model, "gguf", out)
    assert out.read_text() == "mine"
    with pytest.raises(OutputError, match="lies within the model's own folder"):
        featherweight.export(model, "gguf", model / "out.gguf")
    with pytest.raises(OutputError, match="is not there: make it first"):
        featherweight.export(model, "gguf", tmp_path / "nowhere" / "out.gguf")


def test_the_source_is_as_it_was(model: Path, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()}
    time.sleep(0.01)
    featherweight.export(model, "gguf", tmp_path / "out.gguf")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()} == before
