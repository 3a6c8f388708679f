"""How the weights of a layer are spread, and which values a code lets them take: data for the report's histograms."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.codes import Code, code_from, code_layout

MAX_LEVELS = 64


def _along_groups(matrix: Tensor, code: Code) -> Tensor:
    """The matrix with groups in its rows: transposed for groups of outputs."""
    return matrix if code.grouping().along else matrix.T.contiguous()


def histogram_of(original: Tensor, code: Code, layer: str = "", bins: int = 72) -> dict[str, Any]:
    """Data of one figure: how the weights [out, in] of a layer are spread, and one group of them with its levels.

    The group is the one of median relative error. JSON-able; `edges` [bins + 1], `counts` [bins], and of the group
    `row`, `first_column`, `weights`, `levels`, `relative_error`. Groups of outputs lie in a column: theirs are
    `first_row` and `column`. Where a code changes the basis of the layer, all of this is in that basis, where the
    levels are, and `basis` says so in words.
    """
    code, seen, basis = code.opened(original.detach().to("cpu", torch.float32))
    weight, size = _along_groups(seen, code), code.grouping().size
    row, group, error = _typical_group(weight, _along_groups(code.decode(), code), size)
    weights = weight[row, group * size : (group + 1) * size]
    levels = code.group_levels(row, group)
    reach = 1.08 * max([float(weights.abs().max()), *map(abs, levels), 1e-30])
    counts, edges = np.histogram(weight.numpy(), bins=bins, range=(-reach, reach))
    return {
        "layer": layer,
        "basis": basis,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        **_place(code, row, group * size),
        "weights": weights.tolist(),
        "levels": levels if len(levels) <= MAX_LEVELS else [],
        "relative_error": error,
    }


def pictures_of(folder: str | Path, original: str | Path | None, roles: Sequence[str] = ()) -> list[dict[str, Any]]:
    """`histogram_of` some layers of the middle block of a compressed folder.

    folder : an output of `compress`
    original : the model it was made from; without it weights are those that are stored, and no error is known
    roles : of the layers; those of the first and the last layer of the block if none of them is there
    Raises CheckpointError where a folder cannot be read.
    """
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(Checkpoint.open(folder))
        source = None if original is None else stack.enter_context(Checkpoint.open(original))
        specs = module_specs(made.quantization_config) if made.quantization_config else {}
        tensors = {} if source is None else {layer.name: layer.tensor for layer in read_anatomy(source).layers}
        pictures = []
        for name in _middle(specs, roles):
            spec = specs[name]
            code = code_from(spec, {part: made.tensor(f"{name}.{part}") for part in code_layout(spec)})
            if source is not None and name in tensors and list(source.entry(tensors[name]).shape) == spec["shape"]:
                pictures.append(histogram_of(source.tensor(tensors[name]), code, name))
            else:
                stored = histogram_of(code.decode(), code, name)
                told = ", ".join(part for part in ("as stored", stored["basis"]) if part)
                pictures.append({**stored, "relative_error": None, "basis": told})
    return pictures


def _middle(names: Iterable[str], roles: Sequence[str]) -> list[str]:
    """Layers of the middle one of the blocks that names speak of, by their first number."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)\.", name)
        if found:
            blocks.setdefault(int(found[1]), []).append(name)
    if not blocks:
        return list(names)[:2]
    inside = blocks[sorted(blocks)[len(blocks) // 2]]
    chosen = [name for name in inside if name.rpartition(".")[2] in roles]
    return chosen or list(dict.fromkeys([inside[0], inside[-1]]))


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
