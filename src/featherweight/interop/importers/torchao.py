"""torchao folders: tensor subclasses in parts, put together and decoded by torchao, where that is installed.

The weight of a layer lies in the file as `LAYER._weight_qdata`, `LAYER._weight_scale`, ...; what class they make, and
its settings, is a JSON text in the header of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.interop.folders import ForeignFolder, Layers, method_of, read_folder, stored_entries
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.registry import register

MARKER, PART = "._weight_qdata", "._weight_"


@register("importer", "torchao")
class TorchAo(Importer):
    """torchao, decoded by torchao to the type that its tensors have."""

    title = "torchao"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        return method_of(config) == "torchao" and any(name.endswith(MARKER) for name in stored_entries(path))

    @classmethod
    def open(cls, path: Path) -> Imported:
        try:
            import torchao.prototype.safetensors.safetensors_support  # noqa: F401
        except ImportError:
            raise CheckpointError(
                f"{path} is quantised by torchao, which decodes it: pip install torchao, or give the original model"
            ) from None
        ends = {PART + name.partition(PART)[2] for name in stored_entries(path) if PART in name}
        layers = Layers(MARKER, tuple(sorted(ends - {MARKER})))
        return read_folder(path, layers, _describe, lambda folder: "torchao, decoded")


def _describe(folder: ForeignFolder, module: str) -> ImportedTensor:
    whole = _put_together(folder, module)
    return folder.decoded(
        module, tuple(whole.shape), whole.dtype, lambda: _put_together(folder, module).dequantize().detach()
    )


def _put_together(folder: ForeignFolder, module: str) -> Tensor:
    """The tensor of torchao's class, on the mapped file."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    name, first = f"{module}.weight", f"{module}{MARKER}"
    about = folder.checkpoint.file_of(first).metadata.get(name)
    if about is None:
        raise folder.refuse(f"the header of its file does not say what {name} is")
    start = module + PART
    parts = {key: folder.tensor(key) for key in folder.checkpoint.names if key.startswith(start)}
    try:
        found: Tensor = unflatten_tensor_state_dict(parts, {"tensor_names": json.dumps([name]), name: about})[0][name]
    except Exception as error:  # whatever a foreign package raises
        raise folder.refuse(f"torchao cannot read {name}: {type(error).__name__} {str(error)[:100]}") from None
    if found.dim() != 2 or not found.dtype.is_floating_point:
        raise folder.refuse(f"{name} is {found.dtype} {list(found.shape)} to torchao, expected a matrix")
    return found
