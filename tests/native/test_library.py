"""Finding the native library, doing without it, and counting threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import featherweight.native
from featherweight.native import library, place
from featherweight.native.ptqtp import solve_trit_planes


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.get() is None
    assert solve_trit_planes(torch.ones(1, 4)).decode().allclose(torch.ones(1, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="not available"):
        solve_trit_planes(torch.ones(1, 4), backend="native")


def test_missing_and_broken_files_warn_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path in (tmp_path / "missing.so", broken):
        monkeypatch.setenv("FEATHERWEIGHT_NATIVE", str(path))
        with pytest.warns(RuntimeWarning, match="without its native library"):
            assert library.get() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert library.get() is None


def test_failed_self_check_falls_back(
    monkeypatch: pytest.MonkeyPatch, native: library.NativeLibrary, tmp_path: Path
) -> None:
    other = tmp_path / "other.so"
    other.symlink_to(native.path)
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", str(other))
    monkeypatch.setattr(library.NativeLibrary, "unpack_trits", lambda self, packed, count, packing: torch.zeros(count))
    with pytest.warns(RuntimeWarning, match="wrong results"):
        assert library.get() is None


def test_version_is_checked(monkeypatch: pytest.MonkeyPatch, native: library.NativeLibrary) -> None:
    monkeypatch.setattr(library, "VERSION", 99)
    with pytest.raises(OSError, match="needs 99"):
        library.NativeLibrary(native.path)


def test_unknown_instruction_set(native: library.NativeLibrary) -> None:
    with pytest.raises(ValueError, match="sse9"):
        native.select_isa("sse9")


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert library.thread_count() == 3
    assert library.thread_count(7) == 7
    monkeypatch.delenv("FEATHERWEIGHT_THREADS")
    assert library.thread_count() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert library.thread_count() >= 1


def test_forked_process_can_solve(native: library.NativeLibrary) -> None:
    """Threads live for one call only, so a fork after a call finds nothing half alive."""
    code = (
        "import os, torch\n"
        "from featherweight.native.ptqtp import solve_trit_planes\n"
        "w = torch.randn(64, 256)\n"
        "solve_trit_planes(w, threads=2, backend='native')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    solve_trit_planes(w, threads=2, backend='native')\n"
        "    os._exit(0)\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    source = str(Path(featherweight.native.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "FEATHERWEIGHT_NATIVE": str(native.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_the_library_is_looked_for_where_the_build_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An editable install has it under site-packages, and not beside the Python files."""
    build = (Path(__file__).parents[2] / "CMakeLists.txt").read_text("utf-8")
    destination = re.search(r"install\(TARGETS featherweight_native LIBRARY DESTINATION ([\w/]+)\)", build)
    assert destination is not None
    target = tmp_path / "site-packages" / destination[1] / place.FILE_NAME
    target.parent.mkdir(parents=True)
    target.write_bytes(b"")
    away_from_here(monkeypatch, tmp_path)
    assert place.installed() == target


def away_from_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As if the package were installed below a folder, in which nothing is but what a test puts there."""
    monkeypatch.setattr(place, "__file__", str(folder / "source" / "place.py"))
    monkeypatch.setattr(place.sysconfig, "get_path", lambda key: str(folder / "site-packages"))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder in which an installation would have the library, and the process as if it had not looked yet."""
    away_from_here(monkeypatch, tmp_path)
    monkeypatch.delenv("FEATHERWEIGHT_NATIVE", raising=False)
    library._load.cache_clear()
    folder = tmp_path / "site-packages" / "featherweight" / "native"
    folder.mkdir(parents=True)
    yield folder
    library._load.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/bin/false", "no C++ compiler worked (CXX was /bin/false)"), ("no-such-compiler", "CXX was no-such-compiler")],
)
def test_an_installation_without_a_compiler_says_so_and_what_to_do(
    nothing_installed: Path, tmp_path: Path, compiler: str, reason: str
) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    source = Path(__file__).parents[2]
    environment = {**os.environ, "CXX": compiler}
    for arguments in (
        ["-S", source, "-B", tmp_path / "build"],
        ["--install", tmp_path / "build", "--prefix", tmp_path],
    ):
        done = subprocess.run([cmake, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "featherweight" / "native" / place.NOT_COMPILED).replace(nothing_installed / place.NOT_COMPILED)
    with pytest.warns(RuntimeWarning, match="without its native library") as caught:
        assert [library.get(), library.get()] == [None, None]
    (warning,) = caught  # said once
    assert reason in str(warning.message)
    assert "apt install g++" in str(warning.message)
    assert "--force-reinstall" in str(warning.message)
    assert library.why_not() in str(warning.message)


def test_a_library_that_was_lost_is_said_to_be(nothing_installed: Path) -> None:
    with pytest.warns(RuntimeWarning, match="not where it should be") as caught:
        assert library.get() is None
    assert "install featherweight once more" in str(caught[0].message)


def test_why_the_library_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    assert library.why_not() == "FEATHERWEIGHT_NATIVE turns it off; unset that"
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "/nowhere.so")
    assert "/nowhere.so" in library.why_not()


def test_the_command_says_once_what_is_missing_without_a_traceback() -> None:
    """As a note: neither the class of a warning nor a line of our source."""
    environment = {**os.environ, "FEATHERWEIGHT_NATIVE": "/nowhere.so"}
    reference = Path(featherweight.native.__file__).parents[1] / "assets" / "reference"
    command = [
        sys.executable,
        "-m",
        "featherweight",
        "generate",
        str(reference),
        "--prompt",
        "Once",
        "--max-tokens",
        "2",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its native library") == 1
    assert re.search("^note: featherweight runs without its native library", done.stderr, re.MULTILINE)
    assert "Warning" not in done.stderr
