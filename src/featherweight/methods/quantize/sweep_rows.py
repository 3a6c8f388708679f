"""Feedback between the rows of a weight in a sweep over its columns: what two-sided rounding adds.

Let E = W - Q, H_I and H_O the second moments (damped) on the side of inputs and outputs, H = R R' with R = N D^(1/2)
upper triangular, N = I + M unit upper triangular, and U = R^-1 (sweep_factor.py). Then

    tr(E' H_O E H_I) = |D_O^(1/2) G D_I^(1/2)|^2,   G = N_O' E N_I = E + M_O' E M_I + M_O' E + E M_I

and G_ij is the error of rounding (W + M_O' E M_I + M_O' E + E M_I)_ij, in which only rows up to i and columns up to j
occur: any order that comes to (i, j) after these gives the same codes. With A = N_O' E the target is that of a
one-sided sweep over W + M_O' E, since G = A + A M_I; and M_O' E of a row is what the rows before it hand on: in terms
of V = U_O, row k hands -r_k V_ki to row i, r = V^-T A (`featherweight.native.sweep_rows`). So the columns go as they do
in every sweep, a segment at a time, and inside a segment the rows do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.quantize.sweep_factor import FactorSettings, factorise, order_of_columns
from featherweight.native.choice import Backend
from featherweight.native.sweep import Columns, SweptColumns, sweep_columns
from featherweight.native.sweep_rows import sweep_rows, taken

ROWS = 64  # that hand errors to each other one by one; to the rows behind these they do it together


@dataclass(frozen=True)
class RowFeedback:
    """How rows hand on errors.

    upper : V [out, out], float32 or float64, rows in sweep order
    order : int64 [out], the row at each place; None: as they are
    tile : rows that are rounded without feedback between them
    damping : that V was made with, as a share of the mean diagonal entry
    note : what departs from a plain factorisation, in words
    """

    upper: Tensor
    order: Tensor | None
    tile: int
    damping: float
    note: str

    @classmethod
    def of(
        cls, output_gram: Tensor, settings: FactorSettings, order: Literal["none", "activation"], tile: int
    ) -> RowFeedback:
        """From H_O [out, out], which is not changed. RecipeError where it is not finite, or cannot be factorised."""
        if not bool(torch.isfinite(output_gram).all()):
            raise RecipeError("the statistic output_gram is not finite, so its gradients overflowed: gather it again")
        permutation = order_of_columns(output_gram, order, 1)
        factor = factorise({"gram": output_gram}, settings, permutation, False)
        if factor.failure:
            raise RecipeError("the statistic output_gram is no second moment, and nothing added makes it one")
        upper = output_gram.new_zeros(output_gram.shape)
        for piece in factor.pieces:
            upper[piece.first : piece.last, piece.first : piece.last] = piece.upper
        return cls(upper, permutation, tile, factor.damping, factor.note)

    def sweep(self, columns: Columns, options: SolveOptions) -> SweptColumns:
        """`sweep_columns` with feedback between rows; `columns.weight` ends as it was before rounding.

        The totals' loss is the columns' part of tr(E' H_O E H_I), their drift what a row's own columns changed.
        """
        upper = self.upper.to(columns.weight.dtype)
        levels = columns.levels if self.order is None else columns.levels[self.order]
        weight, target = (t.clone(memory_format=torch.contiguous_format) if self.order is None else t[self.order]
                          for t in (columns.weight, columns.original))  # fmt: skip
        step = self.tile if self.tile > 1 else ROWS
        swept: list[SweptColumns] = []
        for first in range(0, len(weight), step):
            last = min(len(weight), first + step)
            part = Columns(weight[first:last], target[first:last], columns.upper, None, levels[first:last],
                           columns.group_of, columns.rule)  # fmt: skip
            one, passed = self._rounded(part, upper[first:last, first:last], options)
            swept.append(one)
            for later in (weight, target):
                later[last:].addmm_(upper[first:last, last:].T, passed, alpha=-1)
        indices, errors = (torch.cat([getattr(one, name) for one in swept]) for name in ("indices", "errors"))
        totals = torch.stack([one.totals for one in swept])
        if self.order is not None:
            back = self.order.argsort()
            weight, indices, errors = weight[back], indices[back], errors[back]
        columns.weight.copy_(weight)
        together = torch.cat([totals[:, :2].sum(0), totals[:, 2:].amax(0)])
        return SweptColumns(indices, errors, None, errors, None, together)

    def _rounded(self, part: Columns, upper: Tensor, options: SolveOptions) -> tuple[SweptColumns, Tensor]:
        """Some rows, and what they hand on: V_JJ^-T A_J, the errors of block factors where they are a tile."""
        backend: Backend = "auto" if options.backend == "native" else options.backend
        if self.tile == 1:
            return sweep_rows(part, upper, options.threads, backend)
        one = sweep_columns(part, options.threads, backend)
        missed = part.original - taken(part.levels, part.group_of, one.indices)
        solved = torch.linalg.solve_triangular(upper.T, torch.cat([missed, one.errors], 1), upper=False)
        passed, weighted = solved.split(missed.shape[1], 1)
        totals = torch.cat([weighted.double().square().sum().view(1), one.totals[1:]])
        return SweptColumns(one.indices, one.errors, None, one.errors, None, totals), passed.contiguous()
