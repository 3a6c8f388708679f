"""A disk that fills up during a calibrated run: one sentence, nothing lost, the same result when there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import OutputError
from featherweight.storage.run import training_state as training_file
from featherweight.tasks.compress import compression
from featherweight.tasks.compress.compression import compress
from models import make_tiny
from outputs import assert_only_output, contents, log_events

FEW = ("calibration.sequences=6", "calibration.length=32")
RUNS: dict[str, dict[str, Any]] = {
    "gptq": {"recipe": "gptq-3", "changes": FEW},
    "tuned": {"recipe": "trit-2", "changes": (*FEW, "corrections=[{kind: scale-tuning, steps: 6, checks: 1}]")},
    "distilled": {"recipe": "discquant-fast", "changes": (*FEW, "rounding.steps=4")},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory; its size is set by `resize`."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, kibibytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(disk)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    return make_tiny("llama", tmp_path_factory.mktemp("wide"), torch.float32, tokenizer=True, **shape)


@pytest.mark.parametrize("name", RUNS)
def test_a_disk_that_fills_up(
    model: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(compression, "_check_disk", lambda *_: None)
    compress(model, out=tmp_path / "expected", threads=1, **RUNS[name])
    monkeypatch.setattr(training_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_file, "SHARE", 0)
    out = disk / "out"
    for kibibytes in (60, 300):
        resize(disk, kibibytes)
        with pytest.raises(OutputError, match=r"the disk is full while writing .*; free some space and run the same"):
            compress(model, out=out, threads=1, **RUNS[name])
        assert not out.exists()
    unsaved = [event for event in log_events(out) if "cannot be saved" in event.get("text", "")]
    assert bool(unsaved) == (name != "gptq")
    resize(disk, 30_000)
    assert compress(model, out=out, threads=1, **RUNS[name]).resumed == (16 if name == "tuned" else 14)
    assert_only_output(out, contents(tmp_path / "expected"))
