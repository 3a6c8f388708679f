"""Dense-and-sparse decomposition: outliers and sensitive weights are kept apart, in a sparse matrix.

SqueezeLLM: Dense-and-Sparse Quantization (arXiv 2306.07629), steps 2 and 4. First the weights with the largest Fisher
information (`sensitive`), then, of those left, the largest in magnitude (`outliers`) are removed: the grid sees zeros
there. After rounding the sparse matrix gets what the dense part misses at these places, W - decode, so that the sum is
W there (to the rounding of the stored values).

Outliers are those from a threshold T on, T = max(|q1 - r IQR|, |q3 + r IQR|) with the quartiles of the matrix. The
paper tunes one r a model until the wanted share of all weights is reached; here `rule: quartiles` takes r as given and
`rule: share` the wanted share of every matrix exactly, which also makes the size known beforehand. Ties are broken by
position, so that counts are exact (the reference takes what lies strictly above the threshold).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Correction
from featherweight.methods.quantize.scales import ScaleDtype, scale_dtype_for
from featherweight.registry import register
from featherweight.storage.codes import Code, code_layout
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum


def largest_mask(values: Tensor, count: int) -> Tensor:
    """bool, True at the `count` largest values; of equal ones the first."""
    flat = values.reshape(-1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if count > 0:
        threshold = flat.topk(min(count, flat.numel())).values[-1]
        mask = flat > threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.view(values.shape)


def quartile_threshold(weight: Tensor, range_multiplier: float) -> float:
    """T of the module for all entries of `weight`; quartiles are entries, not means of neighbours."""
    flat = weight.reshape(-1)
    low = float(flat.kthvalue(max(1, round(flat.numel() * 0.25))).values)
    high = float(flat.kthvalue(max(1, round(flat.numel() * 0.75))).values)
    reach = range_multiplier * (high - low)
    return max(abs(low - reach), abs(high + reach))


@register("correction", "dense-and-sparse")
class DenseAndSparse(Correction):
    """Keep sensitive weights and outliers in a sparse matrix beside the codes (see the module)."""

    portable: ClassVar[bool] = True
    sensitive: float = Field(0.0005, ge=0, lt=1, description="share of weights with the largest Fisher information")
    outliers: float = Field(0.004, ge=0, lt=1, description="share of weights largest in magnitude, of those left")
    rule: Literal["share", "quartiles"] = Field("share", description="outliers by their share or by range_multiplier")
    range_multiplier: float = Field(1.63, ge=0, description="r of the quartile rule; 1.63: 0.4 % of a Gaussian matrix")
    value_dtype: ScaleDtype = Field("float16", description="auto: float32 where float16 would over- or underflow")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fisher",) if self.sensitive > 0 else ()

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        weights = shape[0] * shape[1]
        entries = round(self.outliers * weights) + (round(self.sensitive * weights))
        dtype = "float32" if self.value_dtype == "float32" else "float16"
        spec = {"kind": "sparse", "shape": list(shape), "entries": min(entries, weights), "value_dtype": dtype}
        return sum(entry.nbytes for entry in code_layout(spec).values()) if entries else 0

    def removed(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """bool [out, in]: what goes into the sparse matrix; the same for equal arguments."""
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        fisher = statistics.get("fisher")
        if fisher is not None and self.sensitive > 0:
            mask = largest_mask(fisher, round(self.sensitive * weight.numel()))
        rest = weight.abs().masked_fill(mask, 0)
        if self.rule == "quartiles":
            threshold = quartile_threshold(weight.masked_fill(mask, 0), self.range_multiplier)
            return mask | ((rest >= threshold) & (rest > 0))
        return mask | largest_mask(rest.masked_fill(mask, -1), round(self.outliers * weight.numel()))

    def split(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Code | None]:
        """Zeros at the places removed. The term beside follows in `correct`, as it depends on the codes there."""
        return weight.masked_fill(self.removed(weight, statistics), 0), None

    def correct(self, weight: Tensor, code: Code, statistics: Statistics) -> Code:
        mask = self.removed(weight, statistics)
        if not bool(mask.any()):
            return code
        decoded = code.decode().to(weight.device)
        missing = torch.zeros_like(decoded)
        missing[mask] = weight[mask] - decoded[mask]
        missing[mask] += weight[mask] - (decoded[mask] + missing[mask])  # what float32 lost in the difference
        dtype = scale_dtype_for(self.value_dtype, float(missing.abs().amax()))
        return Sum.of(code, Sparse.encode(missing.cpu(), mask.cpu(), dtype))
