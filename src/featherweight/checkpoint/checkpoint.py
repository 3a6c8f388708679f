"""A source checkpoint: a folder of safetensors and a config.json, read lazily and never loaded as a whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from featherweight.checkpoint.safetensors_file import Entry, SafetensorsFile
from featherweight.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab")
COPIED_NAMES = re.compile(r"(tokenizer|vocab|merges|licen[cs]e|notice|use_policy)", re.IGNORECASE)
FOREIGN_SUFFIXES = (".safetensors", ".onnx", ".gguf", ".h5", ".msgpack", ".tflite", ".ot", ".npz", ".mlmodel")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Checkpoint:
    """A model's weights and configuration, as they lie on disk.

    Attributes
    ----------
    folder : Path
    config : dict, the content of config.json
    files : tuple[SafetensorsFile, ...], the shards in the order of their names
    names : tuple[str, ...], all tensors by shard and, within it, by offset
    """

    def __init__(self, folder: Path, config_bytes: bytes, files: tuple[SafetensorsFile, ...]) -> None:
        self.folder = folder
        self.config: dict[str, Any] = _parse_object(folder / "config.json", config_bytes)
        self.files = files
        self._config_bytes = config_bytes
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.entries:
                other = self._file_of.setdefault(name, file)
                if other is not file:
                    raise CheckpointError(f"tensor {name!r} is in two shards, {other.path.name} and {file.path}")
        self.names = tuple(self._file_of)

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Open a local folder, one .safetensors file with its config.json beside it, or a model on the hub.

        Raises CheckpointError, in one sentence, for whatever keeps the model from being read.
        """
        path = Path(model).expanduser()
        try:
            exists, is_folder = path.exists(), path.is_dir()
        except (OSError, ValueError) as error:  # too long a name, a NUL byte
            raise CheckpointError(f"{str(model)[:200]!r} is neither a path nor a hub id ({error})") from error
        if is_folder:
            return cls._open_folder(path)
        if exists:
            return cls._open_file(path)
        if not isinstance(model, str) or not HUB_ID.fullmatch(model):
            raise CheckpointError(
                f"there is no folder or file {model}, and it does not look like a hub id (owner/name)"
            )
        from featherweight.checkpoint.hub import download

        return cls._open_folder(download(model, revision=revision, token=token))

    @classmethod
    def _open_folder(cls, folder: Path) -> Checkpoint:
        config = _read_config(folder)
        names, index = _find_shards(folder)
        return cls._open_shards(folder, config, names, index)

    @classmethod
    def _open_file(cls, path: Path) -> Checkpoint:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(_pickle_text(path))
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a model: give a folder, a .safetensors file or a hub id")
        return cls._open_shards(path.parent, _read_config(path.parent), [path.name], {})

    @classmethod
    def _open_shards(cls, folder: Path, config: bytes, names: list[str], index: dict[str, str]) -> Checkpoint:
        files: list[SafetensorsFile] = []
        try:
            files.extend(SafetensorsFile.open(folder / name) for name in names)
            shards = {file.path.name: file for file in files}
            for tensor, shard in index.items():
                if tensor not in shards[shard].entries:
                    raise CheckpointError(f"{folder / INDEX_NAME} places tensor {tensor!r} in {shard}, which lacks it")
            checkpoint = cls(folder, config, tuple(files))
            if not checkpoint.names:
                raise CheckpointError(f"{folder} has no weights: its safetensors files hold no tensor")
            return checkpoint
        except BaseException:
            for file in files:
                file.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says about an earlier compression; None for a plain model."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        return found if isinstance(found, dict) else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for file in self.files for entry in file.entries.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(entry.elements for file in self.files for entry in file.entries.values())

    def has(self, name: str) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> SafetensorsFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}") from None

    def entry(self, name: str) -> Entry:
        return self.file_of(name).entry(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See SafetensorsFile.tensor."""
        return self.file_of(name).tensor(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """See SafetensorsFile.rows."""
        return self.file_of(name).rows(name, first, last)

    def release(self, name: str, first: int | None = None, last: int | None = None) -> None:
        """See SafetensorsFile.release."""
        self.file_of(name).release(name, first, last)

    def raw_windows(self, name: str, window_bytes: int = 16 << 20) -> Iterator[memoryview]:
        """See SafetensorsFile.raw_windows."""
        return self.file_of(name).raw_windows(name, window_bytes)

    def other_files(self) -> tuple[Path, ...]:
        """What belongs beside the weights: tokenizer, templates, generation config, code, licence; sorted by name.

        Not among them: config.json (whoever writes an output amends it), weights of any format, their index, README.
        """
        return tuple(sorted(path for path in self.folder.iterdir() if _belongs_beside_weights(path)))

    def identity(self) -> str:
        """sha256 (hex) over config.json and every shard's name, size and header: which model it is.

        Weights changed in place under an unchanged header are not noticed.
        """
        digest = hashlib.sha256(hashlib.sha256(self._config_bytes).digest())
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.size}\0{file.header_sha256}\n".encode())
        return digest.hexdigest()


def _read_config(folder: Path) -> bytes:
    try:
        return (folder / "config.json").read_bytes()
    except FileNotFoundError:
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(f"{folder} is a PEFT adapter, not a model: merge it into its base first") from None
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face model folder") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error.strerror or error}") from error


def _parse_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _find_shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files and, for a sharded model, the index: tensor -> shard."""
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_NAME in present:
        return [SINGLE_NAME], {}
    if (folder / INDEX_NAME).exists():
        index = _read_index(folder)
        return sorted(set(index.values())), index
    if len(present) == 1:
        return present, {}
    if present:
        raise CheckpointError(
            f"{folder} has {len(present)} safetensors files but no {INDEX_NAME} to say what they hold"
        )
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(_pickle_text(pickles[0]))
    raise CheckpointError(f"{folder} has no weights: there is no .safetensors file in it")


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    weight_map = _parse_object(path, content).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}, which is not a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks the shard {shard} that its index names; download it again")
    return weight_map


def _pickle_text(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is read, and there are no safetensors: "
        "convert the model first (load it where you trust it and call save_pretrained(..., safe_serialization=True))"
    )


def _belongs_beside_weights(path: Path) -> bool:
    name, suffix = path.name, path.suffix.lower()
    if name.startswith(".") or name == "config.json" or name.lower().startswith("readme") or not path.is_file():
        return False
    if suffix in PICKLE_SUFFIXES or suffix in FOREIGN_SUFFIXES or name.endswith(".index.json"):
        return False
    return suffix in COPIED_SUFFIXES or COPIED_NAMES.match(name) is not None
