"""Locks on files: one process at a time, and none left behind, however a process ends."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from featherweight.system.files import disk_errors


class FileLock:
    """An advisory lock on a file, for a folder or for a piece of work; a context manager that lets it go.

    The system lets go of it when the last process that holds the open file has ended, also by SIGKILL: children that
    are given `fileno()` hold it together with the one that took it. A lock file that another process removed in the
    meantime does not count; it is made anew.

    Where a system or a file system has no locks (Windows; some network and FUSE ones) every process gets it, which
    `enforced` says.

    Parameters
    ----------
    path : Path
        The file, made where it is not there; it stays empty.
    make_folder : bool
        Make the folder that the file lies in, too, whenever it is missing.
    """

    def __init__(self, path: Path, make_folder: bool = False) -> None:
        self.path, self.make_folder = path, make_folder
        self.enforced = False
        self._stream: BinaryIO | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Take it.

        Parameters
        ----------
        wait : bool
            Until whoever holds it lets go or ends.

        Returns
        -------
        bool
            False where another process holds it; True also where this one did already.

        Raises
        ------
        OutputError
            If the file cannot be made, or the folder it lies in.
        """
        while self._stream is None:
            with disk_errors(self.path):
                if self.make_folder:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                stream = self.path.open("ab")
            try:
                taken, self.enforced = _lock(stream, wait)
                if taken and _is_current(stream, self.path):
                    self._stream = stream
            finally:
                if self._stream is None:
                    stream.close()
            if not taken:
                return False
        return True

    def release(self) -> None:
        """Let go of it; the file stays."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def fileno(self) -> int:
        """The open file, for children that are to hold the lock too; ValueError where this process does not hold it."""
        if self._stream is None:
            raise ValueError(f"the lock {self.path} is not held")
        return self._stream.fileno()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock(stream: BinaryIO, wait: bool) -> tuple[bool, bool]:
    """Whether the lock was got, and whether there are locks here."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two processes on one folder are the caller's to avoid
        return True, False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False, True
    except OSError:  # a file system without locks
        return True, False
    return True, True


def _is_current(stream: BinaryIO, path: Path) -> bool:
    """Whether the file that was locked still is the one of that name: another process may have removed it between."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except OSError:
        return False
