"""Quantising a matrix in windows of rows, for grids whose rows do not depend on one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.methods.quantize.base import SolveOptions, WeightSource
from featherweight.storage.codes import Code, code_from

WINDOW_MULTIPLE = 8  # rows: whole bytes of a bit string of any width


def quantize_windows(source: WeightSource, options: SolveOptions, quantize: Callable[[Tensor], Code]) -> Code:
    """The code of a source from the codes that `quantize` gives for float32 windows [rows, in].

    All stored tensors of the code must be row by row along their dimension 0, without padding between rows.
    """
    rows, columns = source.shape
    step = options.window_rows(source.shape, 4, WINDOW_MULTIPLE)
    parts = []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        parts.append(quantize(source.rows(first, last).float()))
        source.release(first, last)
    if len(parts) == 1:
        return parts[0]
    stored = [part.tensors() for part in parts]
    joined = {name: torch.cat([tensors[name] for tensors in stored]) for name in stored[0]}
    return code_from({**parts[0].spec, "shape": [rows, columns]}, joined)
