"""Hashes at load: whether the bytes that are about to be used are those that were written.

Every file of a compressed model has the SHA-256 of each of its tensors in its header. They are compared while a model
is loaded, by several threads beside whatever else loading does, at about 1.5 GB a second and thread:

    auto    up to 8 GiB of tensors always, and of any size where loading reads every byte anyway (the native decoder)
    always  whatever the size
    never   not at all

`verify=` of a function that loads says which, else the environment variable FEATHERWEIGHT_VERIFY, else it is auto.
Files without hashes, which others have written, are not checked; `feather verify` says how many tensors have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from itertools import islice
from typing import Any

from featherweight.errors import CheckpointError, FeatherError
from featherweight.storage.checkpoint.format import HASHES_KEY
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile

VARIABLE = "FEATHERWEIGHT_VERIFY"
MODES = ("auto", "always", "never")
LARGEST = 8 << 30
"""Bytes of tensors up to which `auto` reads files for their hashes alone."""
WINDOW = 1 << 20  # bytes read at a time; stays in a processor's cache
AHEAD = 64  # tensors whose hashes are computed before they are asked for

Verify = bool | str | None

_chosen: ContextVar[str | None] = ContextVar("featherweight_verify", default=None)


def mode_of(verify: Verify = None) -> str:
    """One of MODES: what the argument says (True: always, False: never), a caller's `verifying`, the environment."""
    if isinstance(verify, bool):
        return "always" if verify else "never"
    if verify is not None:
        return _known(verify, "verify")
    return _chosen.get() or _known(os.environ.get(VARIABLE, "").strip().lower() or "auto", VARIABLE)


def _known(mode: str, what: str) -> str:
    if mode not in MODES:
        raise FeatherError(f"{what} is {mode!r}, expected one of {', '.join(MODES)}")
    return mode


@contextlib.contextmanager
def verifying(verify: Verify) -> Iterator[None]:
    """What loads inside takes this for its `verify`; None changes nothing."""
    token = _chosen.set(mode_of(verify))
    try:
        yield
    finally:
        _chosen.reset(token)


def hashes_of(file: SafetensorsFile) -> dict[str, str]:
    """Tensor -> SHA-256 (hex) as the header has them; empty where there are none. CheckpointError if damaged."""
    try:
        found: Any = json.loads(file.metadata.get(HASHES_KEY, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file.path}: the table of hashes in its header cannot be read: download or compress the model again"
        )
    return found


class TensorHashes:
    """Compares tensors of open files with their hashes, in threads; a context manager.

    used : loading reads every byte anyway, so that `auto` has no limit
    threads : how many hashes are computed at a time
    """

    def __init__(
        self, files: Iterable[SafetensorsFile], verify: Verify = None, threads: int = 1, used: bool = False
    ) -> None:
        opened, mode = tuple(files), mode_of(verify)
        total = sum(entry.nbytes for file in opened for entry in file.entries.values())
        wanted = mode == "always" or (mode == "auto" and (used or total <= LARGEST))
        self._expected: dict[str, tuple[SafetensorsFile, str]] = {}
        for file in opened if wanted else ():
            self._expected |= {name: (file, value) for name, value in hashes_of(file).items() if name in file.entries}
        self._waiting = iter(self._expected)  # in the order of the hashes' table, by name
        self._found: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(max(1, threads), "featherweight-hash") if self._expected else None

    def __enter__(self) -> TensorHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what has not been asked for is not compared."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def check(self, name: str) -> None:
        """CheckpointError naming file and tensor if its bytes are not those once written; nothing without a hash."""
        if self._pool is None or name not in self._expected:
            return
        ahead = max(0, AHEAD - sum(not future.done() for future in self._found.values()))
        for one in (name, *islice(self._waiting, ahead)):
            if one not in self._found:
                self._found[one] = self._pool.submit(_digest, self._expected[one][0], one)
        file, expected = self._expected[name]
        if self._found[name].result() != expected:
            raise CheckpointError(
                f"{file.path}: the bytes of tensor {name} do not match their hash, so the file is damaged: download or "
                f"compress the model again ({VARIABLE}=never loads it all the same)"
            )

    def check_all(self) -> int:
        """`check` every tensor that has a hash; how many there are."""
        for name in self._expected:
            self.check(name)
        return len(self._expected)


def _digest(file: SafetensorsFile, name: str) -> str:
    """Of the file's own bytes: reading them through the mapping would make them count as this process's memory."""
    entry, digest = file.entry(name), hashlib.sha256()
    buffer = memoryview(bytearray(min(WINDOW, max(1, entry.nbytes))))
    try:
        with file.path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            left = entry.nbytes
            while left:
                count = stream.readinto(buffer[:left])
                if not count:
                    raise CheckpointError(f"{file.path} was cut short while it was read: download the model again")
                digest.update(buffer[:count])
                left -= count
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error.strerror or error}") from error
    return digest.hexdigest()


def check_paths(paths: Iterable[str | os.PathLike[str]], verify: Verify = None, threads: int = 1) -> int:
    """Compare all tensors of safetensors files; how many had a hash. CheckpointError naming the first damaged one."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile.open(os.fspath(path))) for path in paths]
        return stack.enter_context(TensorHashes(files, verify, threads)).check_all()
