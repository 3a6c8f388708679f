"""What is finished, piece by piece: tensors with a record under a key, each atomic, hashed and checked when found.

Everything a run must not do twice is kept in one store: the codes of a layer, tensors that calibration changed, the
state of a training, what became of a step that changed the whole model. A key is any text; by convention a kind and a
name, "layer-000012". An artifact is a safetensors file whose header holds the key, the record as JSON and SHA-256 sums
of both and of every tensor; its name appears when it is complete, and what is not as it was written counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.format import HASHES_KEY
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.system.files import PART_SUFFIX, disk_errors, sha256_of

KEY, RECORD, RECORD_HASH = "featherweight.key", "featherweight.record", "featherweight.record_sha256"
SUFFIX = ".safetensors"
LONGEST = 255 - len(SUFFIX) - len(PART_SUFFIX)  # of a file's name on every usual file system


class Store:
    """A folder of artifacts. Several processes may use it at a time, as long as no two keep the same key at once.

    Parameters
    ----------
    folder : Path
        It must exist when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of a key, whether or not it is there; ValueError for a key that no file can be named after."""
        name = quote(key, safe="")
        if not 0 < len(name) <= LONGEST or name.startswith("."):
            raise ValueError(
                f"the key {key[:80]!r} is empty, too long or begins with a dot, so no file can have its name"
            )
        return self.folder / (name + SUFFIX)

    def keep(self, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store an artifact in the place of whatever the key had, whole or not at all.

        Parameters
        ----------
        key : str
        tensors : Mapping[str, Tensor]
            By name, of the types that safetensors knows; there may be none.
        record : Mapping[str, Any]
            JSON-able; read back as it is, in the order of its keys.

        Raises
        ------
        OutputError
            Where it cannot be written; the former artifact of the key is still there.
        """
        blobs = [blob_of(name, tensor) for name, tensor in tensors.items()]
        text = json.dumps(record)
        about = {KEY: key, RECORD: text, RECORD_HASH: _hash(key, text, ((b.name, b.dtype, b.shape) for b in blobs))}
        write_safetensors(self.path(key), blobs, about, sync=False)

    def has(self, key: str) -> bool:
        """Whether there is a file of the key, good or damaged."""
        return self.path(key).exists()

    def names(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted; whether the artifacts are good is not looked at."""
        found = (unquote(path.name.removesuffix(SUFFIX)) for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(key for key in found if key.startswith(prefix))

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a key; None where there is none or it is damaged, and then nothing is left of it.

        Reads all of the artifact: a record that is returned has its tensors beside it.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with SafetensorsFile.open(path) as file:
                text = file.metadata[RECORD]
                expected = _hash(key, text, ((n, e.dtype, e.shape) for n, e in file.entries.items()))
                intact = file.metadata[RECORD_HASH] == expected and not damaged_tensors(file)
                found = json.loads(text) if intact else None
                if isinstance(found, dict):
                    return found
        except (CheckpointError, OSError, KeyError, ValueError, TypeError, AttributeError):
            pass
        self.drop(key)
        return None

    def load(self, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Record and copies of the tensors of a key that `record` has found good, or that was kept just now.

        Raises
        ------
        CheckpointError
            Where there is nothing of the kind. Hashes are not compared once more.
        """
        with self.open(key) as file:
            return json.loads(file.metadata[RECORD]), {name: file.tensor(name).clone() for name in file.entries}

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of `load`."""
        return self.load(key)[1]

    def open(self, key: str) -> SafetensorsFile:
        """The artifact for reading in windows, to be closed by the caller; CheckpointError where there is none."""
        return SafetensorsFile.open(self.path(key))

    def drop(self, key: str) -> None:
        """Remove what a key has, if anything; OutputError where that is not possible."""
        path = self.path(key)
        with disk_errors(path):
            path.unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # another process may have removed it
                total += path.stat().st_size
        return total


def damaged_tensors(file: SafetensorsFile) -> list[str]:
    """Names of tensors whose bytes do not have the hash the file states; KeyError if it states none."""
    hashes = json.loads(file.metadata[HASHES_KEY])
    wrong = [name for name in hashes if name not in file.entries]
    for name in file.entries:
        digest = hashlib.sha256()
        for window in file.raw_windows(name):
            digest.update(window)
        if digest.hexdigest() != hashes.get(name):
            wrong.append(name)
    return wrong


def _hash(key: str, record: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    """Of a record, whose it is, and name, dtype and shape of its tensors, which their bytes do not tell."""
    return sha256_of(json.dumps([key, record, sorted(tensors)]))
