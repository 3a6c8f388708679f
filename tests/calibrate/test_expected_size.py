"""What `calibrate` says before it writes, and how it tells the time that is left."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from featherweight.cli import calibrate
from featherweight.cli.calibrate import GatheringProgress
from featherweight.errors import OutputError
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.system.units import time_text
from featherweight.tasks.compress import gather
from featherweight.tasks.compress.gather import gather_statistics
from models import make_tiny

SHORT = {"sequences": 8, "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama", tokenizer=True)


@pytest.mark.parametrize("needs", [("gram", "mean_abs", "held_out_gram"), ("mean", "inputs")])
def test_the_size_is_said_first_and_is_true(model: Path, needs: tuple[str, ...], tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    out = tmp_path / "statistics.safetensors"

    def watch(event: dict[str, Any]) -> None:
        told.append(event)
        assert event["event"] in ("note", "embedded", "gathering", "precision") or any(
            earlier["event"] == "gathering" for earlier in told
        )

    gather_statistics(model, out, None, needs, SHORT, notify=watch)
    (said,) = [event for event in told if event["event"] == "gathering"]
    with SafetensorsFile.open(out) as file:
        written = sum(entry.nbytes for entry in file.entries.values())
    assert said["bytes"] == written
    assert (said["layers"], said["blocks"], said["windows"]) == (14, 2, 8)


def test_what_the_disk_cannot_hold_is_refused_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"\d kB while they are written"):
        gather_statistics(model, tmp_path / "new" / "statistics.safetensors", settings=SHORT)
    assert not (tmp_path / "new").exists()


def test_time_left_follows_blocks_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches take 3 seconds, moving on to the next block 4: from the second block on the time left is exact."""
    now = [0.0]
    monkeypatch.setattr(calibrate.time, "monotonic", lambda: now[0])
    said = io.StringIO()
    watch = GatheringProgress(Console(file=said))
    watch(
        {"event": "gathering", "blocks": 5, "layers": 35, "windows": 8, "length": 64, "bytes": 4_200_000, "file": "f"}
    )
    assert "about 4.2 MB in f" in said.getvalue()
    watch({"event": "embedded", "batch": 1, "batches": 1})
    for block in range(5):
        for batch in (1, 2):
            now[0] += 3.0
            watch({"event": "gathered", "block": block, "batch": batch, "batches": 2})
            if block:
                assert watch.bar.tasks[0].fields["left"] == f"{time_text(50 - now[0])} left"
        now[0] += 4.0
        watch({"event": "advanced", "block": block, "of": 5})
    assert watch.bar.tasks[0].fields["left"] == "0.0 s left"
