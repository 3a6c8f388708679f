"""A stack of blocks, each one bit a weight and two factors: the iterative absolute value decomposition of BitStack.

BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments (arXiv 2410.23918). R_0 = W, and
for i = 1 ... n: S_i = sign(R_{i-1}) with sign(0) = +1, |R_{i-1}| = U S V by singular values, u_i = U_k S_k^(1/2),
v_i = S_k^(1/2) V_k, W_i = S_i * (u_i v_i), R_i = R_{i-1} - W_i. The code is the sum of the W_i, and each of its
prefixes is one of the nested models. Since signs cancel, |R_i|^2 is what the singular values beyond k of |R_{i-1}|
leave, so errors fall strictly.

Departures, both settings: residuals are those of the *stored* factors (`residual: float` is the authors' code, which
rounds factors and does not feed that back); `signs: false` is their `no_avd`, plain singular values of the residual,
with so much more rank that a block has the same bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Grid, SolveOptions
from featherweight.methods.quantize.scales import LARGEST, SMALLEST
from featherweight.methods.quantize.truncated_svd import truncated_svd
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sign_factor import SignFactor
from featherweight.storage.codes.sum import Sum


@register("grid", "sign-factor")
class SignFactorGrid(Grid):
    """A sum of blocks, signs times a matrix of low rank, each made of what those before leave (see the module)."""

    portable: ClassVar[bool] = True
    device_weight_bytes: ClassVar[int] = 40
    blocks: int = Field(3, ge=1, le=64, description="blocks n, each of about one bit a weight")
    rank: int = Field(16, ge=1, description="rank k of a block's magnitudes; at most the smaller side of the matrix")
    signs: bool = Field(True, description="false: plain singular values, of so much more rank as has the same bytes")
    residual: Literal["stored", "float"] = Field(
        "stored", description="what the next block is made of: less the factors as stored, or before they are rounded"
    )

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        rest, terms = weight.float(), list[Code]()
        dtype: torch.dtype | None = None
        for _ in range(self.blocks):
            signs = rest >= 0 if self.signs else None
            u, s, v = truncated_svd(rest.abs() if self.signs else rest, self._rank((rest.shape[0], rest.shape[1])))
            left, right = (u * s.sqrt()).float(), (s.sqrt().unsqueeze(1) * v).float()
            dtype = dtype or factor_dtype(left, right)
            if self.residual == "stored":
                left, right = left.to(dtype).float(), right.to(dtype).float()
            made = left @ right
            rest = rest - (made if signs is None else torch.where(signs, made, -made))
            stored = left.cpu(), right.cpu()
            if signs is None:
                terms.append(LowRank.encode(*stored, dtype))
            else:
                terms.append(SignFactor.encode(signs.cpu(), *stored, dtype))
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def _rank(self, shape: tuple[int, int]) -> int:
        """k, or k' = k + m n / (16 (m + n)) without signs, whose factors of 16 bits have the bytes of the signs."""
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        return rank if self.signs else min(rank + round(rows * columns / (16 * (rows + columns))), rows, columns)

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        kind = "sign-factor" if self.signs else "low-rank"
        block = {"kind": kind, "rank": self._rank(shape), "factor_dtype": dtype_name(torch.float16)}
        if self.blocks == 1:
            return {**block, "shape": list(shape)}
        return {"kind": "sum", "shape": list(shape), "terms": [dict(block) for _ in range(self.blocks)]}

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        return 40 * rows * columns + 8 * 14 * (self._rank(shape) + 8) * (rows + columns)


def factor_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """float16, but float32 where the first block's factors would over- or underflow it."""
    largest = [float(factor.abs().amax()) for factor in (left, right)]
    fits = max(largest) == 0 or (min(largest) >= SMALLEST and max(largest) <= LARGEST)
    return torch.float16 if fits else torch.float32
