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
    # Addresses move on by what may be added to them in 32 bits: their distance from the first may not fit.
    part = partials + at
    for _ in range(0, splits):  # in order: equal sums on every run
        total += tl.load(part, mask=mine, other=0.0)
        part += split_stride
    if HAS_LOW_RANK:
        at_factor = left + n
        at_weight = u + t.to(tl.int64) * rank
        for _ in range(0, rank):
            factor = tl.load(at_factor, mask=n < rows, other=0.0).to(tl.float32)
            weight = tl.load(at_weight, mask=t < tokens, other=0.0)
            total += weight[:, None] * factor[None, :]
            at_factor += rows
            at_weight += 1
    if HAS_SPARSE:
        first = tl.load(starts + slice)
        entry = first.to(tl.int64) * SLICE + tl.arange(0, SLICE)
        row_of_x = x + t.to(tl.int64)[:, None] * x_stride
        for _ in range(0, tl.load(starts + slice + 1) - first):
            column = tl.load(columns + entry)
            value = tl.load(values + entry).to(tl.float32)
            entry += SLICE
            inputs = tl.load(row_of_x + column[None, :], mask=(t < tokens)[:, None] & (n >= 0)[None, :], other=0.0)
            total += inputs.to(tl.float32) * value[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mine)
