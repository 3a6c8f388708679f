"""Where a checkpoint's tensors belong in the model class of transformers that is built for it.

Names differ where the class renames tensors while loading, has another base prefix, or stacks the matrices of all
experts in one 3-D parameter (transformers 5).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.storage.checkpoint.anatomy import LinearLayer

PER_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")

# the per-expert matrices whose concatenation along the outputs is a 3-D parameter, if the model class says nothing
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
)


@dataclass(frozen=True)
class Slot:
    """A part of a parameter.

    parameter : its path in the model
    expert : slice of the leading dimension, or None for the whole
    transposed : the part is stored as [in, out]
    rows : the rows of the [out, in] matrix, or None for all
    matrix : the parameter is that of a convolution [out, in / groups, *kernel], of which the matrix
        [out, in / groups * product of kernel] is seen
    """

    parameter: str
    expert: int | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    matrix: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The part itself, a view of the parameter: [out, in] for a matrix, any shape for the whole."""
        part = parameter if self.expert is None else parameter[self.expert]
        part = part.view(len(part), -1) if self.matrix else part
        part = part.t() if self.transposed else part
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


class Placement:
    """Slots of the tensors and layers of a checkpoint in `model`, a PreTrainedModel or any module."""

    def __init__(self, model: nn.Module, names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]) -> None:
        self.model = model
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.buffers: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
        self.rename, self.parts = conversions(model)
        self.slots: dict[str, Slot] = {}
        self.unplaced: list[str] = []
        for name in names:
            slot = self._find(name, shape_of(name))
            if slot is None:
                self.unplaced.append(name)
            else:
                self.slots[name] = slot

    def tensor(self, name: str) -> Slot:
        """The slot of a stored tensor, as it is stored."""
        slot = self.slots.get(name)
        if slot is None:
            raise CalibrationError(
                f"{type(self.model).__name__} has no place for the tensor {name!r}: calibration needs a model class "
                "that uses every linear layer of the checkpoint"
            )
        return slot

    def layer(self, layer: LinearLayer) -> Slot:
        """The slot of a layer's weight, [out, in]."""
        slot = self.tensor(layer.tensor)
        if layer.fused_slice:
            return Slot(slot.parameter, layer.expert, layer.transposed)
        return Slot(slot.parameter, slot.expert, slot.transposed or layer.transposed, slot.rows, bool(layer.kernel))

    def _find(self, name: str, shape: tuple[int, ...]) -> Slot | None:
        for path in self._candidates(name):
            found = self.parameters.get(path, self.buffers.get(path))
            if found is not None:
                if tuple(found.shape) != shape:
                    raise CalibrationError(
                        f"tensor {name!r} has shape {list(shape)}, but {type(self.model).__name__} wants "
                        f"{list(found.shape)}: config.json and the weights do not belong together"
                    )
                return Slot(path)
            slot = self._expert_slot(path, shape)
            if slot is not None:
                return slot
        return None

    def _candidates(self, name: str) -> Iterable[str]:
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for path in dict.fromkeys((self.rename(name), name)):
            yield path
            yield prefix + path
            yield path.removeprefix(prefix)

    def _expert_slot(self, path: str, shape: tuple[int, ...]) -> Slot | None:
        match = PER_EXPERT.fullmatch(path)
        if match is None or len(shape) != 2:
            return None
        for parameter, leaves in self.parts:
            fused = self.parameters.get(f"{match['experts']}.{parameter}")
            if match["leaf"] in leaves and fused is not None and fused.dim() == 3:
                expert, place = int(match["expert"]), leaves.index(match["leaf"])
                rows = (place * shape[0], (place + 1) * shape[0]) if len(leaves) > 1 else None
                whole = (shape[0] * len(leaves), shape[1])
                if expert < len(fused) and tuple(fused.shape[1:]) in (whole, whole[::-1]):
                    turned = tuple(fused.shape[1:]) != whole or self._is_transposed(match["experts"])
                    return Slot(f"{match['experts']}.{parameter}", expert, turned, rows)
        return None

    def _is_transposed(self, experts: str) -> bool:
        return bool(getattr(self.model.get_submodule(experts), "is_transposed", False))


def conversions(model: Any) -> tuple[Callable[[str], str], Sequence[tuple[str, tuple[str, ...]]]]:
    """How the class renames tensors while loading, and which per-expert matrices make up its 3-D parameters."""
    if not hasattr(model, "base_model_prefix"):
        return str, PARTS
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        patterns = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})
        return lambda name: functools.reduce(lambda n, p: re.sub(p[0], p[1], n), patterns.items(), name), PARTS
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if not hasattr(entry, "operations")]

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    merges = [e for e in mapping if any(type(o).__name__ == "MergeModulelist" for o in getattr(e, "operations", ()))]
    parts = [
        (entry.target_patterns[0].rpartition(".")[2], tuple(s.split(".")[-2] for s in entry.source_patterns))
        for entry in merges
        if all(source.endswith(".weight") and source.count(".") >= 2 for source in entry.source_patterns)
    ]
    return rename, [*parts, *PARTS]
