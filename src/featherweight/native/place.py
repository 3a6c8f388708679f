"""Where the native library lies, and what to do where there is none."""

from __future__ import annotations

import sysconfig
from pathlib import Path

FILE_NAME = "_featherweight_native.so"
NOT_COMPILED = "_not_compiled.txt"
"""What an installation without a compiler has in its place: one line with the reason."""
REMEDY = (
    "install GCC or Clang (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
    "xcode-select --install; Windows: LLVM's clang++), "
    "then featherweight once more with pip's --force-reinstall --no-deps"
)


def installed(name: str = FILE_NAME) -> Path | None:
    """A file beside this one, or, for an editable install, in the package's place under site-packages."""
    places = [Path(__file__).parent]
    places += [Path(sysconfig.get_path(key)) / "featherweight" / "native" for key in ("platlib", "purelib")]
    return next((place / name for place in places if (place / name).is_file()), None)


def why_missing() -> str:
    """Why there is no library where it should be, and the remedy, as one clause."""
    note = installed(NOT_COMPILED)
    if note is None:
        return f"it is not where it should be, {Path(__file__).parent / FILE_NAME}; install featherweight once more"
    reason = note.read_text("utf-8", errors="replace").strip()
    return f"when it was installed {reason}; {REMEDY}"
