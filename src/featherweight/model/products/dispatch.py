"""Whether the operators can be trusted here: each layout is held against the oracle once, before its first use."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning
from featherweight.model.products import reference
from featherweight.model.products.pack import PackedLinear, pack_code
from featherweight.model.products.structs import native
from featherweight.native import library
from featherweight.storage.codes import Code
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.sherry import Sherry, quartet_codes
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

ROWS, COLUMNS = 75, 200  # five tiles, the last with fewer rows; segments, the last with fewer columns
TOKENS = (1, 3, 16)  # one streams the matrix, few unpack it, sixteen fill the tile registers of AMX
TOLERANCE = 1e-4  # relative; wrong bits give errors of the size of the result

_checking = threading.Lock()


def ready() -> bool:
    """Whether packed layers can run here: there is a native library, and it computes what the oracle does.

    Checked at first use with the instruction set in use. Where one fails its check the next lower one is taken, with a
    warning; False when all have failed. Call it before packing: what is packed is for the instruction set then in use.
    """
    found = library.get()
    if found is None or native() is None:
        return False
    with _checking:
        chosen = found.isa, found.product_isa
        if _trusted(str(found.path), found.product_isa):
            return True
        while found.lower():
            if _trusted(str(found.path), found.product_isa):
                _say_lower(str(found.path), chosen[1], found.product_isa)
                return True
        found.restore_isa(*chosen)  # the solvers have checks of their own
        _say_none(str(found.path))
        return False


@functools.lru_cache(maxsize=16)
def _trusted(path: str, isa: str) -> bool:
    """Whether the products of one file with one instruction set, the one in use, are right."""
    return not _wrong()


def _wrong() -> list[str]:
    """Layouts whose products are wrong with the instruction set in use, and the kinds of code they are for."""
    return sorted({name for name, right in _verdicts() if not right})


@functools.lru_cache(maxsize=16)
def _say_lower(path: str, failed: str, isa: str) -> None:
    warnings.warn(
        f"featherweight uses {isa} instructions: the products of {path} with {failed} are wrong on this processor",
        FallbackWarning,
        stacklevel=3,
    )


@functools.lru_cache(maxsize=16)
def _say_none(path: str) -> None:
    warnings.warn(
        f"featherweight decodes its layers in each call, slowly: the products of {path} with operands in the layouts "
        f"{', '.join(_wrong())} are wrong on this processor, with every instruction set",
        FallbackWarning,
        stacklevel=3,
    )


def _verdicts() -> Iterator[tuple[str, bool]]:
    x = torch.randn(max(TOKENS), COLUMNS, generator=torch.Generator().manual_seed(1))
    for code in _samples():
        try:
            packed = pack_code(code, threads=1)
            yield f"{packed.layouts[0]} ({code.kind})", _right(code, packed, x)
        except (ValueError, MemoryError):
            yield code.kind, False


def _right(code: Code, packed: PackedLinear, x: Tensor) -> bool:
    """Whether the operand holds the matrix, and its products are those of the matrix, for each number of tokens."""
    matrix = code.decode()
    if not packed.note and len(packed.terms) == 1 and not packed.terms[0].steps:
        rows = packed.weight_rows(range(0, ROWS, ROWS - 1))
        if rows is None or not torch.equal(rows, matrix[:: ROWS - 1]):
            return False
    exact = matrix.double().T
    for precision in ("float", "int8"):
        inputs = _as_seen(packed, x, precision)
        if inputs is None:
            continue
        expected = inputs.double() @ exact
        for tokens in TOKENS:
            found = packed(x[:tokens], precision, threads=1).double()
            if not bool((found - expected[:tokens]).norm() <= TOLERANCE * expected[:tokens].norm()):
                return False
    return True


def _as_seen(packed: PackedLinear, x: Tensor, precision: str) -> Tensor | None:
    """The inputs as a product of one operand rounds them; None where several terms round them differently."""
    if precision == "float":
        return x
    if len(packed.terms) > 1 or packed.terms[0].steps:
        return None
    header = packed.operands[0].header
    if packed.operands[0].layout in ("fields", "trits", "quartets"):
        codes, scales, _ = reference.quantize(x, int(header.segment))
        return codes.double() * scales.double()[:, torch.arange(COLUMNS) // int(header.segment)]
    return x.bfloat16() if reference.rounds_to_bfloat16(header) else x


def _samples() -> Iterator[Code]:
    """A small matrix of each kind, whose rows and columns are no multiple of anything."""
    g = torch.Generator().manual_seed(0)
    shape, groups = (ROWS, COLUMNS), -(-COLUMNS // 64)
    scales = torch.rand(ROWS, groups, generator=g) + 0.1

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size or shape, generator=g)

    for planes, weights in ((1, None), (2, None), (2, (3, 2)), (3, None)):
        trits = integers(-1, 2, planes, *shape).to(torch.int8)
        free = scales.unsqueeze(-1) * torch.tensor([1.0, 0.6, 0.3])[:planes]
        tied = weights is not None
        yield TritPlanes.encode(trits, scales if tied else free, 64, tied=tied, weights=weights)
    for bits, symmetric in ((2, True), (3, False), (4, True), (5, False), (8, True)):
        zeros = None if symmetric else integers(0, 1 << bits, ROWS, groups)
        yield Uniform.encode(integers(0, 1 << bits), scales, zeros, bits, 64)
    for bits in (4, 8):  # codes of eight bits must not be taken for signed ones
        yield Uniform.encode(integers(0, 1 << bits), scales, None, bits, 64, offsets=-scales * (1 << bits) / 3)
    yield Codebook.encode(integers(0, 8), torch.randn(ROWS, 1, 8, generator=g))
    yield Dense(torch.randn(shape, generator=g).bfloat16())
    zero_lane = integers(0, 4, ROWS, COLUMNS // 4, 1)
    quartets = (integers(0, 2, ROWS, COLUMNS // 4, 4) * 2 - 1).scatter_(2, zero_lane, 0)
    yield Sherry.encode(quartet_codes(quartets), scales.half(), shape, 64)
    yield Hadamard(
        ColumnScaled(Permuted.encode(_sum(g), torch.randperm(COLUMNS, generator=g)), scales.new_ones(COLUMNS) / 2), 8, 3
    )
    yield Hadamard(Dense(torch.randn(shape, generator=g)), COLUMNS, 3)  # a rotation with a dense factor


def _sum(g: torch.Generator) -> Code:
    """A matrix of every kind of term."""
    factors = torch.randn(ROWS, 4, generator=g), torch.randn(4, COLUMNS, generator=g)
    dense = torch.randn(ROWS, COLUMNS, generator=g)
    terms = Dense(dense), LowRank.encode(*factors, torch.int8), Sparse.encode(dense, dense > 2)
    return Sum.of(*terms)
