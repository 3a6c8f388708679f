"""Parts of a model that belong together: slices of stored tensors that must be moved or removed all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.errors import CheckpointError


@dataclass(frozen=True)
class Slice:
    """Consecutive outputs or inputs of a layer, or entries of a vector, as a slice of the tensor that stores them.

    layer : name of the linear layer; of a norm, an embedding or another parameter its tensor's name
    side : "rows" (outputs of W [out, in], and their biases), "columns" (inputs), or "entries" of what is no layer
    start, stop : of the rows, columns or entries
    tensor : name of the stored tensor
    dim : its dimension that is sliced; where `expert` is given, the dimension of the expert's matrix
    expert : index in the leading dimension of a stacked tensor, None for all of the tensor
    """

    layer: str
    side: str
    start: int
    stop: int
    tensor: str
    dim: int
    expert: int | None = None

    def view(self, stored: Tensor) -> Tensor:
        """The slice itself, a view of the stored tensor."""
        part = stored if self.expert is None else stored[self.expert]
        return part.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Unit:
    """A head, a neuron, an expert, a hidden channel: everything of a model that goes when it goes.

    kind : "head", "kv-group", "value", "query-key", "neuron", "expert" or "channel"; see `Geometry` and `Residual`
    block : number of the block, None for what runs through all of them
    index : number of the unit among those of its owner
    owner : the module it is a part of: an attention, an MLP, a mixture of experts; "" for hidden channels
    expert : number of the expert whose neuron it is, or that it is
    parts : the slices; units of one owner have parts of the same kinds in the same order
    """

    kind: str
    block: int | None
    index: int
    owner: str
    parts: tuple[Slice, ...]
    expert: int | None = None


def arrange(stored: Mapping[str, Tensor], units: Sequence[Unit], order: Sequence[int]) -> dict[str, Tensor]:
    """The tensors that change when `units` are put in another order, and those left out are removed.

    Parameters
    ----------
    stored : every tensor that the units have a part in, by name, as it is stored
    units : all units of one owner; neurons of an expert in a stacked tensor can change places, but as the tensor has
        the same number for all experts, they cannot be removed from one
    order : numbers in `units`, each at most once: the first of the new order, and so on; the others are removed

    Returns
    -------
    New tensors of the same types by name, the given ones being left as they are; a tensor of which nothing remains is
    left out.

    Raises
    ------
    CheckpointError : a number is out of range or there twice, or the units do not have the same parts
    """
    if len(set(order)) != len(order) or not all(0 <= number < len(units) for number in order):
        raise CheckpointError(
            f"an order of {len(units)} units holds each of 0 to {len(units) - 1} at most once, not {list(order)[:20]}"
        )
    alike = {(unit.owner, tuple((part.side, part.stop - part.start) for part in unit.parts)) for unit in units}
    if len(alike) > 1:
        raise CheckpointError("units of different owners or kinds cannot change places: give those of one owner")
    made = {part.tensor: stored[part.tensor] for unit in units for part in unit.parts}
    moves: dict[str, dict[tuple[int | None, int], Tensor]] = {}  # tensor -> expert, dimension -> origin of entries
    for place, unit in enumerate(units):
        sources = units[order[place]].parts if place < len(order) else unit.parts
        for to, source in zip(unit.parts, sources, strict=True):
            if to.tensor != source.tensor:  # experts that are modules of their own
                made[to.tensor] = stored[source.tensor].clone()
                continue
            along = moves.setdefault(to.tensor, {})
            size = made[to.tensor].shape[to.dim + (to.expert is not None)]
            index = along.setdefault((to.expert, to.dim), torch.arange(size))
            gone = place >= len(order)
            index[to.start : to.stop] = -1 if gone else torch.arange(source.start, source.stop)
    for name, along in moves.items():
        moved = _moved(made[name], along)
        if moved.numel():
            made[name] = moved
        else:
            del made[name]
    return made


def _moved(tensor: Tensor, along: Mapping[tuple[int | None, int], Tensor]) -> Tensor:
    """The tensor, or slices of it, with entries of some dimensions taken from elsewhere (-1: removed)."""
    for (expert, dim), index in along.items():
        if expert is None:
            tensor = tensor.index_select(dim, index[index >= 0])
    if all(expert is None for expert, _ in along):
        return tensor
    slices = list(tensor)
    for (expert, dim), index in along.items():
        if expert is not None:
            slices[expert] = slices[expert].index_select(dim, index[index >= 0])
    if len({part.shape for part in slices}) > 1:
        raise CheckpointError(
            "the matrices of all experts are stacked in one tensor, which cannot shrink for one expert alone: set the "
            "neurons that are to go to zero instead"
        )
    return torch.stack(slices)
