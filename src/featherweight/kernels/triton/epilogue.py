"""The end of a linear layer: partial results of splits and terms, bias, low-rank and sparse terms, in one pass.

One program has the rows of one slice of the sparse term (`operand.SLICE`) and a block of tokens; its lanes are rows.
The low-rank term comes as left [rank, rows] and u = right x [tokens, rank], a product too small to matter.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def epilogue_kernel(
    partials,  # [splits, tokens, rows] float32
    bias,  # [rows]
    left,  # [rank, rows]
    u,  # [tokens, rank] float32
    starts,  # [slices + 1] int32
    columns,  # [entries] int32
    values,  # [entries]
    x,  # [tokens, cols], the sparse term's input
    out,  # [tokens, rows]
    splits,
    tokens,
    rows,
    split_stride,
    x_stride,
    rank,
    HAS_BIAS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
):
    slice = tl.program_id(0)
    n = slice * SLICE + tl.arange(0, SLICE)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    mine = (t < tokens)[:, None] & (n < rows)[None, :]
    at = t.to(tl.int64)[:, None] * rows + n[None, :]
    total = tl.zeros((TOKENS, SLICE), tl.float32)
    for split in range(0, splits):  # in order: equal sums on every run
        total += tl.load(partials + split * split_stride + at, mask=mine, other=0.0)
    if HAS_LOW_RANK:
        for r in range(0, rank):
            factor = tl.load(left + r * rows + n, mask=n < rows, other=0.0).to(tl.float32)
            weight = tl.load(u + t * rank + r, mask=t < tokens, other=0.0)
            total += weight[:, None] * factor[None, :]
    if HAS_SPARSE:
        lane = tl.arange(0, SLICE)
        for j in range(tl.load(starts + slice), tl.load(starts + slice + 1)):
            column = tl.load(columns + j * SLICE + lane)
            value = tl.load(values + j * SLICE + lane).to(tl.float32)
            row_of_x = x + t.to(tl.int64)[:, None] * x_stride
            inputs = tl.load(row_of_x + column[None, :], mask=(t < tokens)[:, None] & (n >= 0)[None, :], other=0.0)
            total += inputs.to(tl.float32) * value[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mine)
