"""Finding the native library, doing without it, and counting threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import featherweight.native
from featherweight.native import library
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
    place = tmp_path / "site-packages" / destination[1] / library.FILE_NAME
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "source" / "library.py"))
    monkeypatch.setattr(library.sysconfig, "get_path", lambda key: str(tmp_path / "site-packages"))
    assert library._installed() == place
