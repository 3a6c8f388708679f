"""Two factors in the place of a matrix: a small dense dictionary, and coefficients that may be sparse.

W [out, in] = V D. With `kappa` 1 V [out, r] is dense: the truncated singular value decomposition, of the outputs where
the second moment of the input is known (`whitened`), as SVD-LLM (arXiv 2403.07378) does, else of the weights. With
more, V has one entry in about `kappa`, chosen and refitted as ROCKET (arXiv 2602.11008) does; see
featherweight.methods.quantize.factorise. Rank and number of entries follow from the bytes that may be kept, a bit a
place for where entries are among them (`count: values` leaves these out, as the paper's ratios do). Factors may
themselves be rounded: the dictionary is refitted to coefficients as they are stored.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import Fit, Grid, SolveOptions, WeightSource
from featherweight.methods.quantize.factorise import Whitened, balanced, chosen_entries, refitted, root_of
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.scales import scale_dtype_for
from featherweight.registry import register
from featherweight.storage.codes import Code, code_layout
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.product import Product

Bits = Literal[16, 8, 4]
WORD = 2  # bytes a weight of what is compared with


@dataclass(frozen=True)
class Sizes:
    """rank : atoms r; entries : coefficients stored, out r where they are dense"""

    rank: int
    entries: int


@dataclass
class _Last:
    """What the last layer leaves in a run's memo: other sizes for it need its decomposition again."""

    roots: list[tuple[Tensor, float, Tensor]]  # gram, damping, root
    found: list[tuple[Tensor, Tensor | None, Whitened]]  # weight, root, decomposition: with data and without


@register("grid", "factors")
class FactorsGrid(Grid):
    """A small dense dictionary times coefficients, dense or sparse (see the module)."""

    portable: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    group_size: int = Field(64, ge=1, description="columns of a rounded factor that share scales")
    removed: float = Field(0.3, gt=0, lt=1, description="share of the bytes saved, against 16 bits a weight")
    kappa: float = Field(2.0, ge=1, le=64, description="coefficients for each that is stored; 1: all, a low rank")
    whitened: bool = Field(True, description="least error of outputs (gram), not of weights")
    damping: float = Field(0.0, ge=0, description="added to the gram's diagonal, as a share of its mean")
    importance: float = Field(0.5, ge=0, description="power of an atom's length in the importance of its coefficients")
    reactivated: float = Field(
        0.005, ge=0, lt=1, description="share of the coefficients given to the best of all rows, not to each row"
    )
    ridge: float = Field(1e-3, ge=0, description="of the dictionary's refit, as a share of the mean diagonal")
    judged: Literal["weights", "outputs"] = Field(
        "weights", description="by whose error the refitted dictionary is taken, or the one before"
    )
    dictionary_bits: Bits = Field(16, description="bits a number of the dictionary")
    value_bits: Bits = Field(16, description="bits a coefficient")
    count: Literal["bytes", "values"] = Field(
        "bytes", description="what is a share of what: all that is stored, or numbers without their places"
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.whitened else ()

    # Sizes ----------------------------------------------------------------------------------------------------------

    def sizes(self, shape: tuple[int, int]) -> Sizes:
        """Rank and entries that fit the share kept; at least one atom, with an entry a row."""
        return _sizes(self, shape)

    def _parts(self, shape: tuple[int, int], sizes: Sizes) -> dict[str, Any]:
        rows, columns = shape
        rank, sparse = sizes.rank, self.kappa > 1
        plain = {self.dictionary_bits, self.value_bits}
        if not sparse and plain == {16}:
            return {"kind": "low-rank", "shape": list(shape), "rank": rank, "factor_dtype": "float16"}
        left = self._dense_spec((rows, rank), self.value_bits)
        if sparse:
            left = {"kind": "masked", "shape": [rows, rank], "entries": sizes.entries}
            stored = {"bits": self.value_bits, "scale_dtype": "float16"}
            left |= {"value_dtype": "float16"} if self.value_bits == 16 else stored
        right = self._dense_spec((rank, columns), self.dictionary_bits)
        parts = {
            name: {key: value for key, value in part.items() if key != "shape" or value != list(shape)}
            for name, part in (("left", left), ("right", right))
        }
        return {"kind": "product", "shape": list(shape), **parts}

    def _dense_spec(self, shape: tuple[int, int], bits: int) -> dict[str, Any]:
        if bits == 16:
            return {"kind": "dense", "shape": list(shape), "dtype": "float16"}
        return self._rounder(bits).spec(shape)

    def _rounder(self, bits: int) -> UniformGrid:
        return UniformGrid(bits=bits, group_size=self.group_size, symmetric=True, clip="mse")

    def spec(self, shape: tuple[int, int]) -> dict[str, Any]:
        return self._parts(shape, self.sizes(shape))

    def working_bytes(self, shape: tuple[int, int], options: SolveOptions) -> int:
        rows, columns = shape
        # float64: the matrix, M, its coefficients and atoms twice, products; squares of the side: R, eigenvectors
        return 8 * (8 * rows * columns + 4 * columns * columns + 3 * min(shape) ** 2) + (32 << 20)

    # Factors --------------------------------------------------------------------------------------------------------

    def fit(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Fit:
        raise TypeError("factors belong to whole matrices and have no levels of single weights")

    def quantize(self, weight: Tensor, statistics: Statistics = NO_STATISTICS) -> Code:
        return self._code(Whitened.of(weight, self._root(statistics, [])))

    def quantize_source(
        self, source: WeightSource, options: SolveOptions, statistics: Statistics = NO_STATISTICS
    ) -> Code:
        rows = source.shape[0]
        weight = source.rows(0, rows).float()
        code = self._code(self._decomposed(weight, statistics, options))
        source.release(0, rows)
        return code

    def _root(self, statistics: Statistics, known: list[tuple[Tensor, float, Tensor]]) -> Tensor | None:
        """R of the statistics' second moment; of those `known` already, if it is."""
        gram = statistics.get("gram") if self.whitened else None
        if gram is None:
            return None
        for one, damping, root in known:
            if one is gram and damping == self.damping:
                return root
        made = root_of(gram.double(), self.damping)
        known[:] = [(gram, self.damping, made)]
        return made

    def _decomposed(self, weight: Tensor, statistics: Statistics, options: SolveOptions) -> Whitened:
        last = options.memo.latest
        if not isinstance(last, _Last):
            last = _Last([], [])
            options.memo.latest = last
        root = self._root(statistics, last.roots)
        for one, with_root, found in last.found:
            same = with_root is root and one.shape == weight.shape and one.device == weight.device
            if same and torch.equal(one, weight):
                return found
        made = Whitened.of(weight, root)
        last.found[:] = [*last.found[-1:], (weight.clone(), root, made)]
        return made

    def _code(self, whitened: Whitened) -> Code:
        shape = (whitened.matrix.shape[0], whitened.matrix.shape[1])
        sizes = self.sizes(shape)
        left, dictionary = whitened.coefficients[:, : sizes.rank], whitened.atoms[: sizes.rank]
        if self.kappa == 1:
            return self._stored_dense(whitened, left, dictionary)
        importance = left.abs() * whitened.lengths(sizes.rank) ** self.importance
        mask = chosen_entries(importance, sizes.entries, self.reactivated)
        sparse = torch.where(mask, left, torch.zeros_like(left))
        if self.value_bits == 16:
            return self._stored_sparse(*self._better(whitened, sparse, dictionary), mask)
        # As they are stored: balanced with the dictionary first, since a row's coefficients share a scale.
        sparse, _ = balanced(sparse, whitened.unwhitened(refitted(whitened.matrix, sparse, self.ridge)))
        stored = self._masked(sparse, mask)
        again = stored.decode().double().to(sparse.device)
        right = whitened.unwhitened(refitted(whitened.matrix, again, self.ridge))
        return Product(stored, self._dense(right, self.dictionary_bits))

    def _better(self, whitened: Whitened, sparse: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients with the refitted dictionary or the one before, in the space of the weights."""
        tried = [(one, whitened.unwhitened(one)) for one in (refitted(whitened.matrix, sparse, self.ridge), dictionary)]
        errors = [
            whitened.weight_error(sparse, right) if self.judged == "weights" else whitened.output_error(sparse, atoms)
            for atoms, right in tried
        ]
        return balanced(sparse, tried[0 if errors[0] <= errors[1] else 1][1])

    def _stored_dense(self, whitened: Whitened, left: Tensor, dictionary: Tensor) -> Code:
        left, right = balanced(left, whitened.unwhitened(dictionary))
        if self.value_bits == self.dictionary_bits == 16:
            largest = [float(factor.abs().amax()) for factor in (left, right)]
            return LowRank.encode(left.float().cpu(), right.float().cpu(), _type_for(largest))
        stored = self._dense(left, self.value_bits)
        again = stored.decode().double().to(left.device)
        if self.value_bits < 16:
            right = whitened.unwhitened(refitted(whitened.matrix, again, self.ridge))
        return Product(stored, self._dense(right, self.dictionary_bits))

    def _stored_sparse(self, left: Tensor, right: Tensor, mask: Tensor) -> Code:
        return Product(self._masked(left, mask), self._dense(right, self.dictionary_bits))

    def _masked(self, left: Tensor, mask: Tensor) -> Masked:
        dtype = _type_for([float(left.abs().amax())])
        bits = self.value_bits if self.value_bits < 16 else 0
        return Masked.encode(left.float().cpu(), mask.cpu(), dtype, bits=bits, scale_dtype=dtype)

    def _dense(self, factor: Tensor, bits: int) -> Code:
        if bits < 16:
            return self._rounder(bits).quantize(factor.float().cpu())
        return Dense(factor.to(_type_for([float(factor.abs().amax())])).cpu())


def _type_for(largest: list[float]) -> torch.dtype:
    """Of numbers as large as these: float32 where float16 would not do for one of them."""
    found = {scale_dtype_for("auto", one) for one in largest}
    return torch.float32 if torch.float32 in found else torch.float16


@functools.lru_cache(maxsize=4096)
def _sizes(grid: FactorsGrid, shape: tuple[int, int]) -> Sizes:
    rows, columns = shape
    kept, most = 1 - grid.removed, min(shape)

    def entries(rank: int) -> int:
        return max(rows, math.floor(rows * rank / grid.kappa))

    def left_over(sizes: Sizes) -> int:
        """Bytes, or numbers, that are not used."""
        if grid.count == "values":
            return math.floor(kept * rows * columns) - sizes.rank * columns - sizes.entries
        stored = sum(one.nbytes for one in code_layout(grid._parts(shape, sizes)).values())
        return math.floor(kept * WORD * rows * columns) - stored

    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if left_over(Sizes(middle, entries(middle))) >= 0:
            low = middle
        else:
            high = middle - 1
    rank, found = low, entries(low)
    if grid.kappa > 1:
        free = max(0, left_over(Sizes(rank, found)))
        more = free if grid.count == "values" else 8 * free // grid.value_bits
        found = min(rows * rank, found + more)
    return Sizes(rank, found)
