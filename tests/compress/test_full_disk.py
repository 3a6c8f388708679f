"""Disks that are too small, that fill up meanwhile, and outputs that are a disk of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import OutputError
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.tasks.compress import compression
from featherweight.tasks.compress.compression import compress
from outputs import Stop, assert_only_output, compress_and_die, contents, in_process, log_events, stopping

Mount = Callable[[str, int], Path]
MODEL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(name, kibibytes)`: a small file system in memory."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount")
    mounted: list[Path] = []

    def make(name: str, kibibytes: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    return tiny("llama", **MODEL)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    compress(model, "rtn-4", out, shard_bytes=100_000)
    return contents(out)


def test_too_small_a_disk_is_found_before_the_work(model: Path, mount: Mount) -> None:
    disk = mount("disk", 300)
    with pytest.raises(OutputError, match=r"the disk of .*disk has \d+(\.\d+)? kB free, this run needs \d+ kB: free"):
        compress(model, "rtn-4", disk / "out", shard_bytes=100_000)
    assert {path.name for path in disk.iterdir()} <= {"out.log.jsonl"}


@pytest.mark.parametrize("kibibytes", [16, 60, 140, 300, 400, 440])
def test_a_disk_that_fills_up(
    model: Path, expected: dict[str, bytes], mount: Mount, monkeypatch: pytest.MonkeyPatch, kibibytes: int
) -> None:
    """Whatever it is that no longer fits: one sentence, and the same command goes on when there is room again."""
    disk = mount("disk", kibibytes)
    monkeypatch.setattr(compression, "_check_disk", lambda *_: None)
    out = disk / "out"
    with pytest.raises(OutputError, match=r"the disk is full while writing .*; free some space and run the same"):
        compress(model, "rtn-4", out, shard_bytes=100_000)
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    done = {event["number"] for event in log_events(out) if event["event"] == "layer"}
    assert compress(model, "rtn-4", out, shard_bytes=100_000).resumed >= len(done)
    assert_only_output(out, expected)


def test_a_disk_that_others_fill(model: Path, expected: dict[str, bytes], mount: Mount) -> None:
    disk = mount("disk", 4096)
    out = disk / "out"

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "layer" and event["number"] == 5:
            (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free))

    with pytest.raises(OutputError, match="the disk is full"):
        compress(model, "rtn-4", out, shard_bytes=100_000, observer=fill)
    with pytest.raises(OutputError, match="free"):
        compress(model, "rtn-4", out, shard_bytes=100_000)
    (disk / "others").unlink()
    assert compress(model, "rtn-4", out, shard_bytes=100_000).resumed >= 4
    assert_only_output(out, expected)


# OUT is a mount point, as a volume given to a container is: it can be neither renamed nor removed.


def test_output_on_a_mount_point(model: Path, expected: dict[str, bytes], mount: Mount) -> None:
    out = mount("made/out", 4096)
    with pytest.raises(Stop):
        compress(model, "rtn-4", out, shard_bytes=100_000, observer=stopping("layer", 9))
    assert compress(model, "rtn-4", out, shard_bytes=100_000).resumed >= 9
    assert_only_output(out, expected)
    assert compress(model, "rtn-4", out, shard_bytes=100_000).already_complete
    with pytest.raises(OutputError, match="another command"):
        compress(model, "rtn-3", out)
    compress(model, "rtn-3", out, overwrite=True)
    compress(model, "rtn-4", out, shard_bytes=100_000, overwrite=True)
    assert_only_output(out, expected)


def test_a_mount_point_that_is_too_small(model: Path, mount: Mount) -> None:
    out = mount("made/out", 300)
    with pytest.raises(OutputError, match="kB free"):
        compress(model, "rtn-4", out, shard_bytes=100_000)
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_killed_while_publishing_into_a_mount_point(
    model: Path, expected: dict[str, bytes], mount: Mount, tmp_path: Path
) -> None:
    out = mount("made/out", 8192)
    options = {"recipe": "rtn-4", "shard_bytes": 100_000, "overwrite": True}
    compress(model, "rtn-3", out)
    counted = tmp_path / "counted"
    assert in_process(compress_and_die, str(model), str(out), options, None, str(counted)) == 0
    operations = int(counted.read_text())
    for before_end in range(1, 25):
        compress(model, "rtn-3", out, overwrite=True)
        assert in_process(compress_and_die, str(model), str(out), options, ("file", operations - before_end)) == -9
        compress(model, out=out, **options)  # type: ignore[arg-type]
        assert_only_output(out, expected)


def test_discarding_brings_the_old_files_of_a_mount_point_back(
    model: Path, expected: dict[str, bytes], mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mount("made/out", 4096)
    compress(model, "rtn-4", out, shard_bytes=100_000)
    replace = os.replace

    def sixth_fails(source: Any, target: Any) -> None:
        if Path(target).parent.name == "replaced" and len(list(Path(target).parent.iterdir())) == 5:
            raise Stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", sixth_fails)
    with pytest.raises(Stop):
        compress(model, "rtn-3", out, overwrite=True)
    monkeypatch.undo()
    assert (out / RUN_SUFFIX).exists()
    with pytest.raises(Stop):
        compress(model, "ptqtp", out, overwrite=True, observer=stopping("plan"))
    assert contents(out) == expected
