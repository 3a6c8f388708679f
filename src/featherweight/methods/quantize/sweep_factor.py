"""The factorised second moment of a layer's input, made once and shared by all layers with that input.

H_d = H + lambda I = R R' with R upper triangular (the Cholesky factor of the reversed matrix, reversed), U = R^-1, so
that H_d^-1 = U'U: one factorisation, one triangular inverse, no explicit inverse. The feedback of GPTAQ is
P = [(D U') o M] U with M = 1 above the diagonal. A matrix too large to factorise at once is cut into diagonal blocks,
which leaves out the correlation of inputs from different blocks: an approximation, and reported as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics

DOUBLE_COLUMNS = 8192  # wider second moments in float32 are factorised in float32: half the memory, half the time
TRIANGLE = 512  # triangles up to this size are inverted directly
STRIP = 512  # rows of the feedback matrix that are made at once
FLOOR = 1e-6  # added when damping alone does not help, as a share of the largest diagonal entry; then tenfold
FLOORS = 6

Order = Literal["none", "activation", "group-aware", "group-sum", "similarity"]
WHOLE_GROUPS = ("group-aware", "group-sum")  # orders in which the columns of a group stay together


class FactorSettings(BaseModel):
    """How the second moment is damped, ordered and factorised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Order = Field(
        "none",
        description="as they are; by falling second moment; whole groups by their largest, and so inside; whole groups "
        "by their sum, as they are inside; or by similarity, on the way",
    )
    damping: float = Field(0.01, ge=0, description="added to the diagonal of H, as a share of its mean")
    damping_growth: float = Field(2.0, gt=1, description="factor by which damping grows when H cannot be factorised")
    damping_limit: float = Field(1.0, gt=0, description="largest damping before shares of the largest entry are added")
    factor_columns: int = Field(
        32768, ge=128, multiple_of=128, description="columns factorised at once; wider H is cut into diagonal blocks"
    )


@dataclass(frozen=True)
class Attempt:
    """One try: added to the diagonal are `damping` times its mean and `floor` times its largest entry."""

    damping: float
    floor: float
    succeeded: bool


@dataclass(frozen=True)
class Piece:
    """The factor of columns first to last - 1."""

    first: int
    last: int
    upper: Tensor  # U, float32 (float64 for a float64 second moment)
    feedback: Tensor | None  # P without its alpha
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True)
class Factor:
    """Pieces in order, over columns permuted by `permutation` (None: as they are). No pieces: H is of no use."""

    pieces: tuple[Piece, ...]
    permutation: Tensor | None
    dead: Tensor  # bool [in], permuted: inputs that were always zero
    failure: str = ""

    @property
    def damping(self) -> float:
        """The largest damping that any piece needed."""
        return max((piece.attempts[-1].damping for piece in self.pieces), default=0.0)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return tuple(attempt for piece in self.pieces for attempt in piece.attempts)

    @property
    def note(self) -> str:
        """What departs from a plain factorisation, in words; empty if nothing does."""
        if self.failure:
            return self.failure
        notes = []
        failed = sum(not attempt.succeeded for attempt in self.attempts)
        if failed:
            floor = max(piece.attempts[-1].floor for piece in self.pieces)
            under = f" and {floor:.3g} of its largest diagonal entry" if floor else ""
            notes.append(f"the second moment needed damping {self.damping:.3g}{under} after {failed} failed tries")
        if len(self.pieces) > 1:
            width = self.pieces[0].last - self.pieces[0].first
            notes.append(f"the second moment was cut into {len(self.pieces)} diagonal blocks of {width} columns")
        return "; ".join(notes)


def order_of_columns(gram: Tensor, order: Order, group_size: int) -> Tensor | None:
    """The permutation in which columns are swept, int64 [in]; None for their own order, and for similarity, of which
    nothing is known before the sweep. Stable in ties."""
    weight = gram.diagonal().nan_to_num()
    columns = weight.numel()
    if order in ("none", "similarity"):
        return None
    if order == "activation":
        return weight.argsort(descending=True, stable=True)
    size = min(group_size, columns)
    whole = columns - columns % size
    groups = weight[:whole].view(-1, size)  # GAR, arXiv 2505.14638: the short last group stays where it is
    if order == "group-sum":  # ShiftAddLLM's blocks of columns, arXiv 2406.05981
        inside = torch.arange(size, device=weight.device).expand_as(groups)
        outside = groups.sum(1).argsort(descending=True, stable=True)
    else:
        inside = groups.argsort(dim=1, descending=True, stable=True)
        outside = groups.amax(1).argsort(descending=True, stable=True)
    places = (inside + torch.arange(0, whole, size, device=weight.device).unsqueeze(1))[outside]
    return torch.cat([places.reshape(-1), torch.arange(whole, columns, device=weight.device)])


def factorise(statistics: Statistics, settings: FactorSettings, permutation: Tensor | None, feedback: bool) -> Factor:
    """Factor of `gram` (float32 or float64 [in, in], not changed) and, if wanted, the feedback of `cross`.

    Never raises for numerical reasons: a factor without pieces says in `failure` why the moments are of no use.
    """
    gram = statistics["gram"]
    cross = statistics["cross"] if feedback else None
    dead = gram.diagonal() == 0
    if permutation is not None:
        dead = dead[permutation]
    for name, moment in (("second", gram), ("cross", cross)):
        if moment is not None and not _all_finite(moment):
            return Factor((), permutation, dead, f"the {name} moment of the inputs is not finite")
    if bool(dead.all()):
        return Factor((), permutation, dead, "every input was zero during calibration")
    columns = gram.shape[0]
    pieces: list[Piece] = []
    for first in range(0, columns, settings.factor_columns):
        last = min(columns, first + settings.factor_columns)
        places = slice(first, last) if permutation is None else permutation[first:last]
        found = _factor_piece(_block(gram, places), dead[first:last], settings)
        if isinstance(found, tuple):
            return Factor((), permutation, dead, _failure(found))
        upper, attempts = found.upper, found.attempts
        back = None if cross is None else _feedback(_block(cross, places), dead[first:last], upper)
        pieces.append(Piece(first, last, upper, back, attempts))
    return Factor(tuple(pieces), permutation, dead)


def _all_finite(moment: Tensor) -> bool:
    return bool(torch.isfinite(moment.sum())) or bool(torch.isfinite(moment).all())


def _block(moment: Tensor, places: slice | Tensor) -> Tensor:
    """A copy of the rows and columns `places`."""
    if isinstance(places, slice):
        return moment[places, places].clone(memory_format=torch.contiguous_format)
    return moment[places][:, places]


def _failure(attempts: tuple[Attempt, ...]) -> str:
    last = attempts[-1]
    return (
        f"the second moment of the inputs could not be factorised in {len(attempts)} tries, the last with damping "
        f"{last.damping:.3g} and {last.floor:.3g} of its largest diagonal entry"
    )


@dataclass(frozen=True)
class _Factored:
    upper: Tensor
    attempts: tuple[Attempt, ...]


def _schedule(settings: FactorSettings) -> list[tuple[float, float]]:
    """Dampings and floors in the order in which they are tried."""
    tries = [(settings.damping, 0.0)]
    damping = max(settings.damping, 0.01 / settings.damping_growth)
    while damping * settings.damping_growth <= settings.damping_limit:
        damping *= settings.damping_growth
        tries.append((damping, 0.0))
    return tries + [(damping, FLOOR * 10.0**t) for t in range(FLOORS)]


def _factor_piece(matrix: Tensor, dead: Tensor, settings: FactorSettings) -> _Factored | tuple[Attempt, ...]:
    """`matrix` is used up. The attempts alone, if all of them failed."""
    precise = matrix.dtype == torch.float64 or matrix.shape[0] <= DOUBLE_COLUMNS
    result_dtype = matrix.dtype
    diagonal = matrix.diagonal().double()
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    if not mean > 0:
        mean = float(live.abs().mean()) or 1.0
    diagonal = torch.where(dead, mean, diagonal)  # any number: a dead input has no correlation with the others
    if bool(dead.any()):
        matrix[dead] = 0
        matrix[:, dead] = 0
    matrix = matrix.flip(0, 1)
    if precise:
        matrix = matrix.double()
    attempts: list[Attempt] = []
    largest = float(diagonal.abs().max())
    for damping, floor in _schedule(settings):
        matrix.diagonal().copy_((diagonal + (damping * mean + floor * largest)).flip(0))
        lower, info = torch.linalg.cholesky_ex(matrix)
        succeeded = int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all())
        attempts.append(Attempt(damping, floor, succeeded))
        if not succeeded:
            continue
        del matrix
        # cond(R) is only the root of cond(H): the inverse of the triangle can do with the precision of the result.
        inverse = invert_lower(lower.to(result_dtype))
        return _Factored(inverse.flip(0, 1).contiguous(), tuple(attempts))
    return tuple(attempts)


def invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n], by halves: most of the work is in two triangular products."""
    # rows contiguous, as LAPACK's results are not
    inverse = torch.zeros(lower.shape, dtype=lower.dtype, device=lower.device)
    _invert_into(lower, inverse)
    return inverse


def _invert_into(lower: Tensor, inverse: Tensor) -> None:
    n = lower.shape[0]
    if n <= TRIANGLE:
        unit = torch.eye(n, dtype=lower.dtype, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, unit, upper=False).tril_())
        return
    half = (n // 2 + 63) // 64 * 64
    _invert_into(lower[:half, :half], inverse[:half, :half])
    _invert_into(lower[half:, half:], inverse[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]).neg_()


def _feedback(cross: Tensor, dead: Tensor, upper: Tensor) -> Tensor:
    """P = [(D U') o M] U, strip by strip of rows; `cross` is used up and becomes P."""
    cross = cross.to(upper.dtype)
    cross[:, dead] = 0
    n = cross.shape[0]
    for first in range(0, n, STRIP):
        last = min(n, first + STRIP)
        tail = upper[first:, first:]
        product = (cross[first:last, first:] @ tail.T).triu_(1)
        cross[first:last, first:] = (product @ tail).triu_(1)
        cross[first:last, :first] = 0
    return cross
