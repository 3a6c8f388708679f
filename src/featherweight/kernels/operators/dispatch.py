"""Whether the operators can be trusted here: each layout is held against the oracle once, before its first use."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from featherweight.codes import Code
from featherweight.codes.codebook import Codebook
from featherweight.codes.dense import Dense
from featherweight.codes.sherry import Sherry, quartet_codes
from featherweight.codes.trit_planes import TritPlanes
from featherweight.codes.uniform import Uniform
from featherweight.kernels import library
from featherweight.kernels.operators import reference
from featherweight.kernels.operators.pack import PackedLinear, pack_code
from featherweight.kernels.operators.source import LAYOUTS, native

ROWS, COLUMNS, TOKENS = 19, 200, 3
TOLERANCE = 1e-4  # relative; wrong bits give errors of the size of the result


def ready() -> bool:
    """Whether packed layers can run here: there is a native library, and it computes what the oracle does."""
    found = library.get()
    if found is None or native() is None:
        return False
    return _trusted(str(found.path), found.isa)


@functools.lru_cache(maxsize=8)
def _trusted(path: str, isa: str) -> bool:
    """For one file and instruction set; warns once where it fails."""
    wrong = sorted({name for name, right in _verdicts() if not right})
    if wrong:
        warnings.warn(
            f"featherweight decodes its layers in each call, slowly: the products of {path} with operands in the "
            f"layouts {', '.join(wrong)} are wrong on this processor ({isa})",
            RuntimeWarning,
            stacklevel=3,
        )
    return not wrong


def _verdicts() -> Iterator[tuple[str, bool]]:
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(1))
    for code in _samples():
        for layout in LAYOUTS:
            try:
                packed = pack_code(code, layout=layout, threads=1)
            except ValueError:  # a layout that this kind of code does not have
                if layout == "auto":
                    yield code.kind, False
                continue
            yield f"{packed.layouts[0]} ({code.kind})", _right(code, packed, x)


def _right(code: Code, packed: PackedLinear, x: Tensor) -> bool:
    if packed.note:  # decoded to a dense operand, which has its own sample
        return True
    memory = packed.operands[0].memory
    try:
        exact = torch.equal(reference.decode_operand(memory), code.decode())
        outputs = [(packed(x, p, threads=1), reference.matmul(x, memory, p)) for p in ("float", "int8")]
    except (ValueError, MemoryError):
        return False
    return exact and all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in outputs)


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
        yield TritPlanes.encode(trits, scales if tied else free, 64, tied, weights=weights)
    for bits, symmetric in ((2, True), (3, False), (4, True), (5, False), (8, True)):
        zeros = None if symmetric else integers(0, 1 << bits, ROWS, groups)
        yield Uniform.encode(integers(0, 1 << bits), scales, zeros, bits, 64)
    yield Codebook.encode(integers(0, 8), torch.randn(ROWS, 1, 8, generator=g))
    yield Dense(torch.randn(shape, generator=g).bfloat16())
    zero_lane = integers(0, 4, ROWS, COLUMNS // 4, 1)
    quartets = (integers(0, 2, ROWS, COLUMNS // 4, 4) * 2 - 1).scatter_(2, zero_lane, 0)
    yield Sherry.encode(quartet_codes(quartets), scales.half(), shape, 64)
