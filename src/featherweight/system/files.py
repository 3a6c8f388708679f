"""Files that appear whole or not at all, and what a disk says as one sentence."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from featherweight.errors import OutputError

PART_SUFFIX = ".part"
"""Of what is being written: the file of its name appears when it is complete."""


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A stream into a new file, which takes the name `path` when the block ends; after an error nothing is left of it.

    Two processes must not write the same path at a time: what is not complete has one name too, PATH.part.

    Parameters
    ----------
    path : Path
        File to make or to replace; its folder must exist.
    sync : bool
        Wait for the disk, so that not even a power cut leaves a complete name on incomplete bytes.

    Raises
    ------
    OutputError
        In one sentence, for whatever the system says; see `disk_errors`.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    with disk_errors(path):
        try:
            with part.open("wb") as stream:
                yield stream
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a small file in UTF-8, as `replacing` does.

    Raises
    ------
    OutputError
        Where it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


def to_json(value: object) -> str:
    """JSON as all files of ours have it: indented by two, letters as they are, a line break at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def to_json_line(value: object) -> str:
    """JSON on one line, with a line break at the end."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file, it cannot be read, or it holds something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def sha256_of(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write to `path` into one sentence.

    Raises
    ------
    OutputError
        Instead of any OSError; where the disk is full it says that the same command goes on.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {path}; free some space and run the same command again, "
                "it goes on where it stopped"
            ) from error
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
