"""LoRC: the error of a quantised matrix, approximated by a matrix of low rank that is stored beside it.

ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation
(arXiv 2303.08302). E = W - decode(code) in float32, E = U S V by singular values, left = U_m S_m^(1/2) and
right = S_m^(1/2) V_m. Data-free, and after any rounding. Factors are rounded to float16 or, per row of each factor, to
int8 (that these are rows is reconstructed: the paper names no layout).

`weighted` is not LoRC: it minimises the error of the output, ||(E - left right) L|| with L L' the gram matrix of the
input, from the singular values of E L; right is then S_m^(1/2) V_m L^-1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Correction
from featherweight.methods.quantize.factorise import root_of
from featherweight.methods.quantize.scales import scale_dtype_for
from featherweight.methods.quantize.truncated_svd import truncated_svd
from featherweight.registry import register
from featherweight.storage.codes import Code, code_layout
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.sum import Sum

DAMPING = 0.01  # of the mean diagonal of the gram matrix


@register("correction", "lorc")
class LowRankCorrection(Correction):
    """Add the leading singular triplets of the rounding error as two factors (see the module)."""

    portable: ClassVar[bool] = True
    rank: int = Field(8, ge=1, description="singular triplets m; at most the smaller side of the matrix")
    factors: Literal["float16", "int8", "float32"] = Field("float16", description="how the factors are stored")
    weighted: bool = Field(False, description="least error of the output (needs the gram matrix); not LoRC")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.weighted else ()

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        spec = {"kind": "low-rank", "shape": list(shape), "rank": min(self.rank, *shape), "factor_dtype": self.factors}
        return sum(entry.nbytes for entry in code_layout(spec).values())

    def correct(self, weight: Tensor, code: Code, statistics: Statistics) -> Code:
        error = weight.float() - code.decode().to(weight.device)
        gram = statistics.get("gram") if self.weighted else None
        left, right = self._factors(error, gram)
        return Sum.of(code, self._encode(left, right))

    def _factors(self, error: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
        rank = min(self.rank, *error.shape)
        root = None if gram is None else root_of(gram.double(), DAMPING)
        u, s, v = truncated_svd(error if root is None else error.double() @ root, rank)
        left, right = u * s.sqrt(), s.sqrt().unsqueeze(1) * v
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return left, right

    def _encode(self, left: Tensor, right: Tensor) -> LowRank:
        largest = [float(factor.abs().amax()) for factor in (left, right)]
        dtypes = {scale_dtype_for("auto", value) for value in largest}
        scale_dtype = torch.float32 if torch.float32 in dtypes else torch.float16
        stored = {"float16": scale_dtype, "int8": torch.int8, "float32": torch.float32}[self.factors]
        return LowRank.encode(left.float().cpu(), right.float().cpu(), stored, scale_dtype)
