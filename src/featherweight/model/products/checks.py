"""What the operators of `torch.ops.featherweight` take, asked by the kernels and by their shape rules alike.

Sizes may be symbolic: the rules run while a model is traced. Every refusal is a ValueError of one sentence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.model.products.structs import PRECISIONS
from featherweight.storage.codes.orthogonal import EXPECTED, kernel_order

INTEGERS = (torch.int16, torch.int32, torch.int64)


def require(condition: Any, message: str) -> None:
    """ValueError unless the condition, which may be symbolic, holds."""
    torch._check_value(condition, lambda: message)  # type: ignore[no-untyped-call]


def check_input(x: Tensor) -> None:
    require(x.is_floating_point() and x.dim() >= 1, f"inputs are floats [..., in], not {x.dtype} {list(x.shape)}")


def check_matmul(x: Tensor, operands: tuple[Tensor, ...], out_features: int, precision: str) -> None:
    check_input(x)
    for operand in operands:
        right = operand.dtype == torch.uint8 and operand.dim() == 1
        require(right, f"an operand is uint8 [bytes], not {operand.dtype} {list(operand.shape)}")
    require(out_features >= 1, f"out_features is {out_features}, expected 1 or more")
    require(precision in PRECISIONS, f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


def check_sparse(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor, out_features: int) -> None:
    """All that shapes and dtypes tell; `check_sparse_contents` looks at the indices."""
    check_input(x)
    require(out_features >= 0, f"out_features is {out_features}, expected 0 or more")
    for name, indices in (("row_pointers", row_pointers), ("columns", columns)):
        right = indices.dtype in INTEGERS and indices.dim() == 1
        require(right, f"{name} is int32 or int64 [n], not {indices.dtype} {list(indices.shape)}")
    right = values.is_floating_point() and values.dim() == 1
    require(right, f"values are floats [n], not {values.dtype} {list(values.shape)}")
    require(
        row_pointers.shape[0] == out_features + 1,
        f"row_pointers has {row_pointers.shape[0]} entries, expected {out_features + 1}",
    )
    require(columns.shape[0] == values.shape[0], f"there are {columns.shape[0]} columns for {values.shape[0]} values")


def check_sparse_contents(row_pointers: Tensor, columns: Tensor, in_features: int) -> None:
    """That pointers rise from 0 to the number of entries, and that columns lie within the input."""
    entries = columns.numel()
    ends = (int(row_pointers[0]), int(row_pointers[-1]))
    if ends != (0, entries) or bool((row_pointers.diff() < 0).any()):
        raise ValueError(f"row_pointers do not rise from 0 to the number of entries, {entries}")
    if entries > 2**31 - 1:
        raise ValueError(f"a sparse matrix has at most {2**31 - 1} entries, this one {entries}")
    if entries and (int(columns.min()) < 0 or int(columns.max()) >= in_features):
        raise ValueError(f"columns has an index outside of 0 to {in_features - 1}")


def check_hadamard(x: Tensor, block: int, signs: Tensor | None) -> None:
    check_input(x)
    columns = x.shape[-1]
    require(
        kernel_order(block) is not None and columns % block == 0,
        f"block is {block}, expected {EXPECTED}, that divides {columns}",
    )
    if signs is None:
        return
    require(signs.dim() == 1 and signs.shape[0] == columns, f"signs are {list(signs.shape)}, expected [{columns}]")


def check_quantize(x: Tensor, block: int, signs: Tensor | None, segment: int) -> None:
    check_hadamard(x, block, signs)
    require(segment >= 1, f"segment is {segment}, expected 1 or more columns")
