"""A folder that another tool has quantised, opened: its modules part by part, everything else as it is.

Importers of folders share this: which tensors belong to a quantised layer, checks of names, shapes and types, each with
its sentence, and what is written beside the weights.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError, shown
from featherweight.interop.imports import Imported, ImportedTensor
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.resolve import Place
from featherweight.storage.checkpoint.safetensors_file import Entry, SafetensorsFile
from featherweight.storage.checkpoint.shards import find_shards
from featherweight.storage.checkpoint.writer import DTYPE_CODES
from featherweight.storage.codes import Code, code_layout
from featherweight.system.files import disk_errors

SETTINGS_KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is an older name for the same."""
SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""What says how the source is quantised, and would be wrong beside what it becomes."""
MODEL_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INTEGERS = ("int32", "int16", "int8", "uint8")
FLOATS = ("float16", "bfloat16", "float32")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the quantisation; empty where it says nothing."""
    for key in SETTINGS_KEYS:
        found = config.get(key)
        if isinstance(found, dict) and found:
            return found
    return {}


def method_of(config: Mapping[str, Any]) -> str:
    """The `quant_method`, in small letters; an empty string where there is none."""
    method = settings_of(config).get("quant_method")
    return method.lower() if isinstance(method, str) else ""


def stored_entries(path: Path) -> dict[str, Entry]:
    """All tensors in a folder, from the headers of its shards; none where these cannot be read."""
    found: dict[str, Entry] = {}
    with contextlib.suppress(CheckpointError, OSError):
        for name in find_shards(path).names if path.is_dir() else ():
            with SafetensorsFile.open(path / name) as file:
                found |= file.entries
    return found


def has_part(path: Path, *suffixes: str) -> bool:
    """Whether a tensor in the folder has a name that ends so."""
    return any(name.endswith(suffixes) for name in stored_entries(path))


@dataclass(frozen=True)
class Layers:
    """Which tensors of a folder make its quantised layers.

    marker : what a layer's name is followed by where it is quantised, ".qweight"
    parts : further such names that belong to it, ".scales"
    left_out : names of what is not of weights and is not read, ".input_scale"
    """

    marker: str
    parts: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (self.marker, *self.parts)


class ForeignFolder:
    """See the module. A CheckpointError of its methods names folder, tensor and what was expected.

    path : the folder
    settings : content of config.json's quantization_config
    dtype : in which the model computes, as config.json says; bfloat16 where it does not
    notes : what is odd, a sentence each
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = Checkpoint.at(Place(path))
        self.settings = settings_of(self.checkpoint.config)
        named = self.checkpoint.config.get("dtype", self.checkpoint.config.get("torch_dtype"))
        self.dtype = MODEL_DTYPES.get(named if isinstance(named, str) else "", torch.bfloat16)
        self.notes: list[str] = []

    def refuse(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read: {text}")

    def setting(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number of the settings."""
        value = self.settings.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(
                f"{key} in its quantization_config is {shown(value)}, expected a whole number from {low} to {high}"
            )
        return value

    def has(self, name: str) -> bool:
        return self.checkpoint.has(name)

    def shape(self, name: str, dimensions: int, dtypes: Iterable[str]) -> tuple[int, ...]:
        """Shape of a tensor that must be there, with so many dimensions, of one of these types of torch."""
        if not self.has(name):
            raise self.refuse(f"the tensor {name} is missing, which its layer needs: download the model again")
        entry = self.checkpoint.entry(name)
        dtype, shape = str(entry.torch_dtype).removeprefix("torch."), tuple(entry.shape)
        expected = tuple(dtypes)
        if dtype not in expected:
            raise self.refuse(f"{name} is {dtype}, expected {' or '.join(expected)}")
        if len(shape) != dimensions or not all(shape):
            raise self.refuse(f"{name} has the shape {list(shape)}, expected {dimensions} dimensions, none of them 0")
        return shape

    def expect(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise self.refuse(f"{name} has the shape {list(found)}, where its layer needs {list(expected)}")

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)

    def coded(self, module: str, spec: dict[str, Any], make: Callable[[], Code]) -> ImportedTensor:
        """The weight of a module as a code; what its making finds wrong names the module."""
        try:
            code_layout(spec)
        except ValueError as error:
            raise self.refuse(f"the layer {module} has no place here, {error}") from None
        shape = (int(spec["shape"][0]), int(spec["shape"][1]))
        return ImportedTensor(f"{module}.weight", shape, self._told(module, make), spec=spec)

    def decoded(
        self, module: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> ImportedTensor:
        """The weight of a module as plain values; `make` gives them in any floating-point type."""
        return ImportedTensor(f"{module}.weight", shape, self._told(module, lambda: make().to(dtype)), dtype)

    def plain(self, name: str) -> ImportedTensor:
        """A tensor as it is stored."""
        entry = self.checkpoint.entry(name)
        if entry.torch_dtype not in DTYPE_CODES:
            raise self.refuse(f"{name} is {entry.dtype} and has no scale beside it, so nobody knows what it means")
        return ImportedTensor(name, tuple(entry.shape), lambda: self.tensor(name), entry.torch_dtype)

    def _told(self, module: str, make: Callable[[], Any]) -> Callable[[], Any]:
        def load() -> Any:
            try:
                return make()
            except (ValueError, IndexError, RuntimeError) as error:
                raise self.refuse(f"the layer {module} is damaged ({error})") from None

        return load

    def write_beside(self, folder: Path) -> None:
        """Tokenizer, templates, generation config."""
        with disk_errors(folder):
            for file in self.checkpoint.other_files():
                if file.name not in SETTINGS_FILES:
                    shutil.copyfile(file, folder / file.name)


def read_folder(
    path: Path,
    layers: Layers,
    describe: Callable[[ForeignFolder, str], ImportedTensor],
    origin: Callable[[ForeignFolder], str],
) -> Imported:
    """A folder as an imported model.

    describe : the weight of the module of that name
    origin : what the folder is, in a few words
    """
    folder = ForeignFolder(path)
    try:
        said = origin(folder)
        tensors = _tensors(folder, layers, describe)
        config = {key: value for key, value in folder.checkpoint.config.items() if key not in SETTINGS_KEYS}
        notes = (*folder.checkpoint.notes, *dict.fromkeys(folder.notes))
        return Imported(config, tensors, said, folder.write_beside, notes, folder.checkpoint.close)
    except BaseException:
        folder.checkpoint.close()
        raise


def _tensors(
    folder: ForeignFolder, layers: Layers, describe: Callable[[ForeignFolder, str], ImportedTensor]
) -> tuple[ImportedTensor, ...]:
    names = folder.checkpoint.names
    modules = {name.removesuffix(layers.marker) for name in names if name.endswith(layers.marker)}
    owned = {module + part for module in modules for part in layers.all}
    found: list[ImportedTensor] = []
    for name in names:
        if name.endswith(layers.marker):
            found.append(describe(folder, name.removesuffix(layers.marker)))
        elif name.endswith(layers.left_out) if layers.left_out else False:
            folder.notes.append(f"tensors such as {name} are left out: they belong to activations, not to weights")
        elif name not in owned:
            stray = next((part for part in layers.parts if name.endswith(part)), None)
            if stray is not None and stray != ".weight":
                raise folder.refuse(
                    f"{name} belongs to a quantised layer whose {name.removesuffix(stray) + layers.marker} is missing: "
                    "download the model again"
                )
            found.append(folder.plain(name))
    taken = {tensor.name for tensor in found}
    if len(taken) < len(found):
        twice = next(tensor.name for tensor in found if sum(other.name == tensor.name for other in found) > 1)
        raise folder.refuse(f"the weight {twice} is there twice, quantised and plain")
    return tuple(found)
