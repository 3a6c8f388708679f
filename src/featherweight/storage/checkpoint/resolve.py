"""What the name of a model means, the same for every command and for Python.

A folder, one .safetensors file with its config.json beside it, or a hub id (owner/name, or a bare name such as gpt2);
`~` is the home folder. A file or folder of another tool that an importer knows (axis `importer` of the registry) means
the folder that it becomes in the cache. What is none of these gets a sentence of its own: a pickle, an adapter, a
diffusers pipeline, a Git LFS pointer, a path that does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.registry import registered
from featherweight.storage.checkpoint.format import METHOD
from featherweight.system.files import read_object

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PATH_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_BYTES = 1024  # a pointer is three lines
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(frozen=True)
class Place:
    """folder : has config.json and the weights
    file : the one weight file that was named instead of its folder, or None
    read_from : the file or folder of another tool that `folder` was made from, or None
    """

    folder: Path
    file: Path | None = None
    read_from: Path | None = None

    @property
    def model(self) -> Path:
        """What was named, as a path."""
        return self.file or self.folder


def resolve(model: str | Path, revision: str | None = None, token: str | None = None) -> Place:
    """Where a model lies; a hub id is fetched into the hub's own cache, or found there.

    Raises CheckpointError, in one sentence, for whatever is not a model.
    """
    path = located(model, revision, token)
    importer = find_importer(path)
    if importer is not None:
        cached = import_module("featherweight.interop.cache").cached  # a room above: by its name, as importers are
        return Place(cached(importer, path), read_from=path)
    if path.is_dir():
        _check_folder(path)
        return Place(path)
    _check_file(path)
    _check_folder(path.parent)
    return Place(path.parent, path)


def located(model: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The file or folder that a name means; a hub id is fetched. CheckpointError where there is none."""
    path = local_path(model)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long a name, a NUL byte
        raise CheckpointError(f"{str(model)[:200]!r} is neither a path nor a hub id ({error})") from error
    return path if exists else _from_hub(model, path, revision, token)


def find_importer(path: Path) -> Any:
    """The importer (a class of the axis `importer`) that knows a file or folder; None where it is no other tool's."""
    config = read_object(path / "config.json") if path.is_dir() else {}
    if path.suffix == ".safetensors" or (path.is_dir() and _is_own(config)):
        return None
    found: list[Any] = list(registered("importer").values())
    return next((importer for importer in found if importer.recognises(path, config)), None)


def _is_own(config: dict[str, Any]) -> bool:
    """A folder of ours, or a plain one: the usual case, for which no importer needs to be asked."""
    method = config.get("quantization_config") or config.get("compression_config")
    return bool(config) and (not method or (isinstance(method, dict) and method.get("quant_method") == METHOD))


def local_path(model: str | Path) -> Path:
    """The path that a name would be, with `~` for the home folder."""
    try:
        return Path(model).expanduser()
    except (RuntimeError, ValueError) as error:  # the home of an unknown user
        raise CheckpointError(f"{str(model)[:200]!r} is not a usable path: {error}") from None


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves where the file itself was not fetched."""
    try:
        if path.stat().st_size > LFS_BYTES:
            return False
        with path.open("rb") as stream:
            return stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def refuse_lfs_pointer(path: Path) -> None:
    """CheckpointError if a file is a Git LFS pointer."""
    if is_lfs_pointer(path):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download it "
            "with `hf download`"
        )


def pickle_text(path: Path) -> str:
    """Why a pickle is refused, and what to do."""
    return (
        f"{path} is a pickle, which can run code when it is read, and there are no safetensors: "
        "convert the model first (load it where you trust it and call save_pretrained(..., safe_serialization=True))"
    )


def gguf_text(path: Path) -> str:
    """That a folder's model is a GGUF file, which is named by itself."""
    return f"{path.parent} has no safetensors, and {path.name} in it is a GGUF file: give that file's name, {path}"


def adapter_text(folder: Path) -> str:
    """Why an adapter is refused, and what to do."""
    return (
        f"{folder} is a PEFT adapter, not a model: merge it into its base first "
        "(PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(DIR))"
    )


def _from_hub(model: str | Path, path: Path, revision: str | None, token: str | None) -> Path:
    text = str(model)
    if not isinstance(model, str) or not HUB_ID.fullmatch(text) or path.suffix.lower() in PATH_SUFFIXES:
        raise CheckpointError(f"there is no folder or file {model}, and it does not look like a hub id (owner/name)")
    if path.parent.name and path.parent.is_dir():  # models/llama, mistyped: as likely a path as a hub id
        raise CheckpointError(
            f"there is no {path.name} in the folder {path.parent}; if the hub's {text} is meant, run this elsewhere or "
            "give a downloaded folder"
        )
    from featherweight.storage.checkpoint.hub import download

    return download(text, revision=revision, token=token)


def _check_file(path: Path) -> None:
    """Only one kind of file is a model."""
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(pickle_text(path))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a model: give a folder, a .safetensors file or a hub id")
    if path.name == ADAPTER_WEIGHTS:
        raise CheckpointError(adapter_text(path.parent))


def _check_folder(folder: Path) -> None:
    """What can be said of a folder before its files are read."""
    config = folder / "config.json"
    if not config.exists():
        raise CheckpointError(_without_config(folder))
    for name in ("config.json", *TOKENIZER_NAMES):
        refuse_lfs_pointer(folder / name)


def _without_config(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).exists():
        return adapter_text(folder)
    if (folder / "model_index.json").exists():
        return (
            f"{folder} is a diffusers pipeline of several models: give the folder of one of them that is a language "
            "model, such as its text_encoder"
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        return gguf_text(gguf[0])
    return f"{folder} has no config.json, so it is not a Hugging Face model folder"
