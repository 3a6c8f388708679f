"""How the weights of a layer are spread, and which values a code lets them take: data for the report's histograms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.storage.codes import Code

MAX_LEVELS = 64


def _along_groups(matrix: Tensor, code: Code) -> Tensor:
    """The matrix with groups in its rows: transposed for groups of outputs."""
    return matrix if code.grouping().along else matrix.T.contiguous()


def histogram_of(original: Tensor, code: Code, layer: str = "", bins: int = 72) -> dict[str, Any]:
    """Data of one figure: how the weights [out, in] of a layer are spread, and one group of them with its levels.

    The group is the one of median relative error. JSON-able; `edges` [bins + 1], `counts` [bins], and of the group
    `row`, `first_column`, `weights`, `levels`, `relative_error`. Groups of outputs lie in a column: theirs are
    `first_row` and `column`.
    """
    weight, size = _along_groups(original.detach().to("cpu", torch.float32), code), code.grouping().size
    row, group, error = _typical_group(weight, _along_groups(code.decode(), code), size)
    weights = weight[row, group * size : (group + 1) * size]
    levels = code.group_levels(row, group)
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
    return {"row": row, "first_column": first} if code.grouping().along else {"first_row": first, "column": row}


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
