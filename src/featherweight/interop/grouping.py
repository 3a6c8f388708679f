"""Groups of input columns as other tools say them: by an index of groups, by blocks, by one number for all."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.storage.codes.base import groups_of


def column_order(index: Tensor, groups: int) -> tuple[Tensor | None, int]:
    """The order of columns in which an index of groups is 0, 0, ..., 1, 1, ... (None: they stand so), and the size.

    index : whole numbers [in], the group of a column
    ValueError where groups are not of equal size, but for the last, or the index names others than 0 to groups - 1.
    """
    places = index.long()
    least, most = int(places.min()), int(places.max())
    if least < 0 or most >= groups:
        raise ValueError(f"it has groups from {least} to {most}, of {groups}")
    counts = torch.bincount(places, minlength=groups)
    size, columns = int(counts.max()), places.numel()
    order = torch.argsort(places, stable=True)
    if groups_of(columns, size) != groups or not torch.equal(places[order], torch.arange(columns) // size):
        raise ValueError(
            f"it puts from {int(counts.min())} to {size} columns into a group, and only groups of equal size have a "
            "place here"
        )
    return (None, size) if torch.equal(order, torch.arange(columns)) else (order, size)


def spread(values: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """A number of each block of `block` rows and columns as one of each weight of a matrix of `shape`."""
    rows, columns = (torch.arange(side) // size for side, size in zip(shape, block, strict=True))
    return values[rows][:, columns]
