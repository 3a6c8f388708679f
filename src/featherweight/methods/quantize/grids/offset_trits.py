"""One asymmetric ternary plane, {mu - alpha, mu, mu + alpha} a group, fitted as in PT2-LLM.

PT2-LLM: Post-Training Ternarization for Large Language Models (arXiv 2510.03267). Two stages, for all groups at once:
iterative ternary fitting (ITF) alternates the closed-form least squares of (alpha, mu) and nearest rounding from a
threshold start until the trits stand still; activation-aware grid alignment (AGA) then solves (alpha, mu) once more,
trits frozen, for the squared error of the layer's output. The authors' core files could not be read: the equations are
re-derived exact minimisers of the published objectives, and how the authors combine alignment with a sweep's
compensation is unknown (here the sweep fits and aligns a group when it reaches it, then walks its columns).

Alignment keeps the ITF values of a group where its normal equations are close to singular or alpha would not be
positive. Without a `gram` statistic there is none. `damping` and `alignment_inputs: mixed` are options.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Fit
from featherweight.methods.quantize.row_grid import RowGrid, grouped
from featherweight.methods.quantize.sorted_groups import SortedGroups
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.base import dtype_name
from featherweight.storage.codes.offset_trits import OffsetTrits

START_THRESHOLD = 0.75  # of the mean |w - mu|
SINGULAR = 1e-10  # determinant over the product of the diagonal


class Affine(NamedTuple):
    """Parameters of R groups: alpha >= 0 and mu, float64 [R]."""

    alpha: Tensor
    mu: Tensor


@register("grid", "offset-trits")
class OffsetTritGrid(RowGrid):
    """alpha t + mu with t in {-1, 0, 1}, two numbers a group (see the module)."""

    portable: ClassVar[bool] = True
    fitting: Literal["init", "itf"] = Field("itf", description="threshold start alone, or iterated to a fixed point")
    alignment: bool = Field(True, description="align alpha and mu to the layer's output (AGA), trits frozen")
    alignment_inputs: Literal["current", "mixed"] = Field(
        "current", description="current: inputs of the compressed stream; mixed: outputs of the full-precision stream"
    )
    damping: float = Field(0.0, ge=0, le=1, description="share of the mean diagonal added to the gram for alignment")
    max_iterations: int = Field(50, ge=1, description="ITF iterations at most")
    packing: Literal["base3", "2bit"] = Field("base3", description="five trits a byte (1.6 bits) or four (2 bits)")

    @property
    def needs(self) -> tuple[str, ...]:
        if not self.alignment:
            return ()
        return ("gram", "cross") if self.alignment_inputs == "mixed" else ("gram",)

    def fit_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> Fit:
        return self.solve_rows(weight, dtype, statistics)[0]

    def solve_rows(self, weight: Tensor, dtype: torch.dtype, statistics: Statistics) -> tuple[Fit, Tensor]:
        rows, columns = weight.shape
        values, mask = grouped(weight.double(), self.group_size)
        groups = SortedGroups(values.flatten(0, 1), mask.expand_as(values).flatten(0, 1))
        fitted = initial(groups)
        thresholds = START_THRESHOLD * mean_deviation(groups, fitted.mu)
        if self.fitting == "itf":
            fitted, _ = iterate(groups, fitted, self.max_iterations)
            thresholds = fitted.alpha / 2
        shape = values.shape[:2]
        alpha, mu, thresholds = (t.view(*shape, 1) for t in (*fitted, thresholds))
        trits = (values > mu + thresholds).double() - (values <= mu - thresholds).double()
        if self.alignment and "gram" in statistics:
            gram, crossed = self._blocks(statistics, mask)
            alpha, mu = (t.unsqueeze(-1) for t in align(values * mask, trits * mask, gram, crossed, alpha, mu))
        fit = {"scales": alpha.squeeze(-1).to(dtype), "offsets": mu.squeeze(-1).to(dtype)}
        return fit, (trits + 1).to(torch.uint8).view(rows, -1)[:, :columns].contiguous()

    def _blocks(self, statistics: Statistics, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Diagonal blocks of X X' and X X_fp', float64 [groups, size, size], zero in the padding."""
        gram = diagonal_blocks(statistics["gram"], mask)
        crossed = gram
        if self.alignment_inputs == "mixed" and "cross" in statistics:
            crossed = gram + diagonal_blocks(statistics["cross"], mask).mT  # X (X + (X_fp - X))'
        if self.damping:
            diagonal = gram.diagonal(dim1=1, dim2=2)
            ridge = self.damping * diagonal.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True) * mask
            gram, crossed = gram + torch.diag_embed(ridge), crossed + torch.diag_embed(ridge)
        return gram, crossed

    def levels(self, fit: Fit) -> Tensor:
        steps = torch.tensor([-1.0, 0.0, 1.0], device=fit["scales"].device)
        return fit["scales"].float().unsqueeze(-1) * steps + fit["offsets"].float().unsqueeze(-1)

    def level_count(self) -> int:
        return 3

    def encode(self, indices: Tensor, fit: Fit) -> Code:
        trits = indices.to(torch.int8) - 1
        of = torch.arange(indices.shape[1], device=indices.device) // self.group_size
        used = (fit["scales"] != 0)[:, of]
        return OffsetTrits.encode(
            trits * used, fit["scales"], fit["offsets"], self.group_size, self.packing, fit["scales"].dtype
        )

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "offset-trits",
            "shape": list(shape),
            "group_size": self.group_size,
            "packing": self.packing,
            "scale_dtype": dtype_name(torch.float32 if self.scale_dtype == "float32" else torch.float16),
        }


def mean_deviation(groups: SortedGroups, center: Tensor) -> Tensor:
    """Mean |w - center| of every group [R]."""
    mass, first = groups.cells(center.unsqueeze(-1))
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=mass.device)
    return ((first - center.unsqueeze(-1) * mass) * signs).sum(-1).clamp(min=0) / groups.mass


def initial(groups: SortedGroups) -> Affine:
    """The start: mu the mean, trits by a threshold of 0.75 mean |w - mu|, alpha their least squares for this mu."""
    mu = groups.first / groups.mass
    threshold = START_THRESHOLD * mean_deviation(groups, mu)
    mass, first = groups.cells(torch.stack([mu - threshold, mu + threshold], -1))
    used = mass[:, 0] + mass[:, 2]
    total = first[:, 2] - first[:, 0] - mu * (mass[:, 2] - mass[:, 0])
    return Affine(torch.where(used > 0, total / used.clamp(min=1), 0.0).clamp(min=0), mu)


def iterate(groups: SortedGroups, start: Affine, limit: int) -> tuple[Affine, int]:
    """ITF: least squares and nearest rounding in turn until no trit changes; also the iteration at which it stopped."""
    threshold = START_THRESHOLD * mean_deviation(groups, start.mu)
    mass, first = groups.cells(torch.stack([start.mu - threshold, start.mu + threshold], -1))
    fitted = start
    for iteration in range(1, limit + 1):
        fitted = least_squares(groups, mass, first)
        half = fitted.alpha / 2
        new_mass, first = groups.cells(torch.stack([fitted.mu - half, fitted.mu + half], -1))
        if torch.equal(new_mass, mass):
            return fitted, iteration
        mass = new_mass
    return fitted, limit


def least_squares(groups: SortedGroups, mass: Tensor, first: Tensor) -> Affine:
    """(alpha, mu) for trits given as cells [R, 3]; alpha = 0 and mu the mean where all trits are equal."""
    count, total = groups.mass, groups.first
    s1, s2 = mass[:, 2] - mass[:, 0], mass[:, 2] + mass[:, 0]
    along = first[:, 2] - first[:, 0]
    determinant = count * s2 - s1 * s1
    regular = determinant > 0
    safe = torch.where(regular, determinant, 1.0)
    alpha = torch.where(regular, (count * along - s1 * total) / safe, 0.0)
    mu = torch.where(regular, (s2 * total - s1 * along) / safe, total / count)
    return Affine(alpha.clamp(min=0), mu)  # trits rise with the weight: negative is rounding only


def diagonal_blocks(matrix: Tensor, mask: Tensor) -> Tensor:
    """Blocks of a matrix [in, in] that belong to the groups of `mask` [groups, size]: float64 [groups, size, size]."""
    count, size = mask.shape
    short = count * size - matrix.shape[0]
    padded = torch.nn.functional.pad(matrix, (0, short, 0, short)).view(count, size, count, size)
    return padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()


def align(
    weight: Tensor, trits: Tensor, gram: Tensor, crossed: Tensor, alpha: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor]:
    """AGA: the (alpha, mu) of least ||w' X_fp - (alpha t + mu 1)' X||^2, [out, groups] each.

    weight, trits [out, groups, size], zero in the padding; gram X X' and crossed X X_fp' [groups, size, size];
    alpha, mu [out, groups, 1] stay where the solution is not unique, not finite, or has alpha <= 0.
    """
    ones = gram.sum(1)  # 1' S [groups, size]
    v = (trits * ones).sum(-1)
    q = ones.sum(-1)
    p = (torch.einsum("ogi,gij->ogj", trits, gram) * trits).sum(-1)
    a = (torch.einsum("ogi,gij->ogj", trits, crossed) * weight).sum(-1)
    c = (crossed.sum(1) * weight).sum(-1)
    determinant = p * q - v * v
    aligned = (q * a - v * c) / determinant, (p * c - v * a) / determinant
    usable = (determinant > SINGULAR * p * q) & (aligned[0] > 0) & aligned[0].isfinite() & aligned[1].isfinite()
    return torch.where(usable, aligned[0], alpha.squeeze(-1)), torch.where(usable, aligned[1], mu.squeeze(-1))
