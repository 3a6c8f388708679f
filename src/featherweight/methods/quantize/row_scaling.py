"""Multiplying the rows of a code by factors without touching its digits: only stored scales change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from featherweight.methods.quantize.decoding import replaced
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

BY_ROW: dict[type[Code], tuple[str, ...]] = {
    Uniform: ("scales",),
    TritPlanes: ("scales",),
    OffsetTrits: ("scales", "offsets"),
    BinaryPlanes: ("scales",),
    Codebook: ("codebooks",),
    Dense: ("weight",),
}
"""Codes whose floating-point tensors have a row of the matrix as first dimension."""


def rows_scaled(code: Code, factors: Tensor) -> Code | None:
    """The code of diag(factors) W, digits unchanged and scales rounded to their stored type.

    factors : [out], positive. None where the code has no scales of single rows, or these would over- or underflow.
    """
    if isinstance(code, Sum):
        terms = [rows_scaled(term, factors) for term in code.terms]
        known = [term for term in terms if term is not None]
        return Sum(tuple(known)) if len(known) == len(terms) else None
    if isinstance(code, Hadamard | ColumnScaled | Permuted):
        inner = rows_scaled(code.inner, factors)
        return None if inner is None else replaced(code, {"inner": inner})
    fields = BY_ROW.get(type(code))
    if fields is None or (isinstance(code, Uniform) and code.axis != "input"):
        return None
    if isinstance(code, BinaryPlanes) and (code.scales is None or code.rows_per_scale != 1):
        return None
    changed: dict[str, Any] = {}
    for field in fields:
        before: Tensor = getattr(code, field)
        after = (before.double() * factors.double().view(-1, *([1] * (before.dim() - 1)))).to(before.dtype)
        lost = (after == 0) & (before != 0) & (before.abs() >= torch.finfo(before.dtype).tiny)
        if bool(lost.any()) or not bool(after.isfinite().all()):
            return None
        changed[field] = after
    return replaced(code, changed)
