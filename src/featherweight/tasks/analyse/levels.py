"""How the weights of a layer are spread, and which values a code lets them take: data for the report's histograms."""

from __future__ import annotations

import itertools
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.storage.codes import Code
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

MAX_LEVELS = 64


@singledispatch
def levels_of(code: Code, row: int, group: int) -> list[float]:
    """Values that the weights of a group may take. In general, those that occur."""
    size = group_size_of(code)
    values: list[float] = np.unique(code.decode()[row, group * size : (group + 1) * size].numpy()).tolist()
    return values


@levels_of.register
def _(code: TritPlanes, row: int, group: int) -> list[float]:
    scales = code.scales.float()[row, group].reshape(-1).tolist()
    if code.tied:
        scales = [scales[0] * weight for weight in code.plane_weights]
    sums = (
        sum(s * t for s, t in zip(scales, trits, strict=True))
        for trits in itertools.product((-1, 0, 1), repeat=len(scales))
    )
    return sorted(set(sums))


@levels_of.register
def _(code: Uniform, row: int, group: int) -> list[float]:
    if code.axis == "output":  # here a row is a column of the matrix, see `_along_groups`
        row, group = group, row
    scale, zero_point = float(code.scales[row, group]), int(code.unpack()[1][row, group])
    return sorted({scale * (q - zero_point) for q in range(1 << code.bits)})


@levels_of.register
def _(code: QuantizedInput, row: int, group: int) -> list[float]:
    found: list[float] = levels_of(code.inner, row, group)
    return found


def group_size_of(code: Code) -> int:
    """Columns (rows for groups of outputs) that share a set of levels; whole rows for a code without groups."""
    if isinstance(code, QuantizedInput):  # its own group size is that of the input
        return group_size_of(code.inner)
    whole = code.shape[0 if groups_outputs(code) else 1]
    return min(int(getattr(code, "group_size", None) or whole), whole)


def groups_outputs(code: Code) -> bool:
    """Whether a group is of rows of one column, and not of columns of one row."""
    inner = code.inner if isinstance(code, QuantizedInput) else code
    return isinstance(inner, Uniform) and inner.axis == "output"


def _along_groups(matrix: Tensor, code: Code) -> Tensor:
    """The matrix with groups in its rows: transposed for groups of outputs."""
    return matrix.T.contiguous() if groups_outputs(code) else matrix


def histogram_of(original: Tensor, code: Code, layer: str = "", bins: int = 72) -> dict[str, Any]:
    """Data of one figure: how the weights [out, in] of a layer are spread, and one group of them with its levels.

    The group is the one of median relative error. JSON-able; `edges` [bins + 1], `counts` [bins], and of the group
    `row`, `first_column`, `weights`, `levels`, `relative_error`. Groups of outputs lie in a column: theirs are
    `first_row` and `column`.
    """
    weight, size = _along_groups(original.detach().float(), code), group_size_of(code)
    row, group, error = _typical_group(weight, _along_groups(code.decode(), code), size)
    weights = weight[row, group * size : (group + 1) * size]
    levels = levels_of(code, row, group)
    reach = 1.08 * max([float(weights.abs().max()), *map(abs, levels), 1e-30])
    counts, edges = np.histogram(weight.numpy(), bins=bins, range=(-reach, reach))
    return {
        "layer": layer,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        **_place(code, row, group * size),
        "weights": weights.tolist(),
        "levels": levels if len(levels) <= MAX_LEVELS else [],
        "relative_error": error,
    }


def _place(code: Code, row: int, first: int) -> dict[str, int]:
    if groups_outputs(code):
        return {"first_row": first, "column": row}
    return {"row": row, "first_column": first}


def _typical_group(weight: Tensor, decoded: Tensor, size: int) -> tuple[int, int, float]:
    """(row, group, relative error) of the group of median error among those that are not zero."""
    rows, columns = weight.shape
    padding = -columns % size
    norms, errors = (
        torch.nn.functional.pad(m, (0, padding)).view(rows, -1, size).square().sum(-1).sqrt().flatten()
        for m in (weight, weight - decoded)
    )
    relative = torch.where(norms > 0, errors / norms, torch.nan)
    present = relative.isnan().logical_not().nonzero().flatten()
    if not len(present):
        return 0, 0, 0.0
    median = int(present[relative[present].argsort(stable=True)[len(present) // 2]])
    groups = len(norms) // rows
    return median // groups, median % groups, float(relative[median])
