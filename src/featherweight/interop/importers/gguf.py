"""Models in GGUF files, as llama.cpp and what is built on it run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.interop.gguf.config import config_of, family_of
from featherweight.interop.gguf.file import SUFFIX, GGUFModel, is_gguf, parts_of
from featherweight.interop.gguf.names import sources
from featherweight.interop.gguf.tokenizer import TokenizerFiles
from featherweight.interop.imports import Imported, Importer
from featherweight.registry import register


@register("importer", "gguf")
class GGUF(Importer):
    """A file, any part of one that was split, or a folder in which nothing but one such model lies."""

    title = "GGUF"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        if path.is_dir():
            return not config and bool(_models_in(path)) and not any(path.glob("*.safetensors"))
        return is_gguf(path)

    @classmethod
    def files(cls, path: Path) -> tuple[Path, ...]:
        return tuple(parts_of(_file_of(path)))

    @classmethod
    def open(cls, path: Path) -> Imported:
        model = GGUFModel(_file_of(path))
        try:
            family = family_of(model)
            config = config_of(model, family)
            tensors = sources(model, family, config)
            tokenizer = TokenizerFiles(model.path, model.metadata, config)
            described = tuple(tensor.described() for tensor in tensors)
        except BaseException:
            model.close()
            raise
        return Imported(
            config,
            described,
            f"GGUF, {_most(model)}, {model.metadata['general.architecture']}",
            tokenizer.write,
            tokenizer.notes,
            model.close,
        )


def _most(model: GGUFModel) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for stored in model.tensors.values():
        kind = stored.info.type
        weights[kind.name] += stored.info.nbytes // kind.bytes * kind.weights
    return weights.most_common(1)[0][0]


def _models_in(folder: Path) -> list[Path]:
    """GGUF files in a folder, one of each model's parts."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())
    return list({tuple(_parts(path)): path for path in reversed(found)}.values())[::-1]


def _parts(path: Path) -> list[Path]:
    try:
        return parts_of(path)
    except CheckpointError:  # said when the model is opened
        return [path]


def _file_of(path: Path) -> Path:
    """The file that is meant by a path: itself, or the only model in a folder."""
    if not path.is_dir():
        return path
    models = [found for found in _models_in(path) if "mmproj" not in found.name.lower()]
    if len(models) != 1:
        names = ", ".join(found.name for found in models[:4])
        raise CheckpointError(f"{path} has {len(models)} GGUF models ({names}): name one of the files")
    return models[0]
