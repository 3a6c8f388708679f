"""Random codes of every kind, and what the tests of operators share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from featherweight.model.products import PackedLinear
from featherweight.model.products import structs as c
from featherweight.native import library
from featherweight.storage.codes import Code
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.sherry import Sherry, quartet_codes, quartets_of
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

needs_native = pytest.mark.skipif(c.native() is None, reason="the native library is not built")

ISAS = ("baseline", "avx2", "avxvnni", "avx512", "vbmi", "bf16", "amx", "neon", "i8mm")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def scales_of(rows: int, groups: int, *more: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, groups, *more, generator=generator(seed)) + 0.05


def groups_of(columns: int, size: int) -> int:
    return -(-columns // size)


def trits(
    rows: int,
    columns: int,
    planes: int = 2,
    group_size: int = 128,
    tied: bool = False,
    weights: tuple[int, ...] | None = None,
    scale_dtype: torch.dtype | str = torch.float16,
    packing: str = "base3",
    seed: int = 0,
) -> TritPlanes:
    digits = torch.randint(-1, 2, (planes, rows, columns), generator=generator(seed)).to(torch.int8)
    groups = groups_of(columns, group_size)
    scales = scales_of(rows, groups) if tied else scales_of(rows, groups, planes)
    return TritPlanes.encode(
        digits, scales, group_size, tied=tied, packing=packing, scale_dtype=scale_dtype, weights=weights
    )  # type: ignore[arg-type]


def uniform(
    rows: int,
    columns: int,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Uniform:
    g, groups = generator(seed), groups_of(columns, group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g)
    zeros = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=g)
    return Uniform.encode(codes, scales_of(rows, groups), zeros, bits, group_size, scale_dtype=scale_dtype)


def with_offsets(
    rows: int,
    columns: int,
    bits: int = 4,
    group_size: int = 32,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Uniform:
    """Weights on both sides of 0, as those of min-max grids are."""
    g, groups = generator(seed), groups_of(columns, group_size)
    codes, scales = torch.randint(0, 1 << bits, (rows, columns), generator=g), scales_of(rows, groups)
    offsets = -scales * ((1 << bits) - 1) * torch.rand(rows, groups, generator=g)
    return Uniform.encode(codes, scales, None, bits, group_size, scale_dtype=scale_dtype, offsets=offsets)


def codebook(rows: int, columns: int, bits: int = 3, group_size: int | None = None, seed: int = 0) -> Codebook:
    g, groups = generator(seed), 1 if group_size is None else groups_of(columns, group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g)
    return Codebook.encode(codes, torch.randn(rows, groups, 1 << bits, generator=g), group_size)


def dense(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Dense:
    return Dense(numbers(rows, columns, seed=seed).to(dtype))


def sherry(rows: int, columns: int, group_size: int = 128, lane_stride: int = 1, seed: int = 0) -> Sherry:
    g, count = generator(seed), quartets_of(columns, lane_stride)
    signs = torch.randint(0, 2, (rows, count, 4), generator=g) * 2 - 1
    signs.scatter_(2, torch.randint(0, 4, (rows, count, 1), generator=g), 0)
    scales = scales_of(rows, groups_of(columns, group_size)).half()
    return Sherry.encode(quartet_codes(signs), scales, (rows, columns), group_size, lane_stride)


GROUP_SIZES = (16, 20, 32, 64, 100, 128, 1 << 20)


@st.composite
def trit_codes(draw: st.DrawFn) -> TritPlanes:
    planes = draw(st.integers(1, 3))
    tied = draw(st.booleans())
    weights = tuple(draw(st.lists(st.integers(1, 27), min_size=planes, max_size=planes))) if tied else None
    return trits(
        draw(st.integers(1, 50)),
        draw(st.integers(1, 300)),
        planes,
        draw(st.sampled_from(GROUP_SIZES)),
        tied,
        draw(st.sampled_from((weights, None))),
        draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32, "log8"))),
        draw(st.sampled_from(("base3", "2bit"))),
        draw(st.integers(0, 99)),
    )


@st.composite
def uniform_codes(draw: st.DrawFn) -> Uniform:
    rows, columns, bits = draw(st.integers(1, 50)), draw(st.integers(1, 300)), draw(st.integers(1, 8))
    size, zero = draw(st.sampled_from(GROUP_SIZES)), draw(st.sampled_from(("middle", "points", "offsets")))
    dtype, seed = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))), draw(st.integers(0, 99))
    if zero == "offsets":
        return with_offsets(rows, columns, bits, size, dtype, seed)
    return uniform(rows, columns, bits, size, zero == "middle", dtype, seed)


@st.composite
def other_codes(draw: st.DrawFn) -> Code:
    rows, columns, seed = draw(st.integers(1, 50)), draw(st.integers(1, 300)), draw(st.integers(0, 99))
    size = draw(st.sampled_from(GROUP_SIZES))
    kinds: list[Callable[[], Code]] = [
        lambda: codebook(rows, columns, draw(st.integers(1, 8)), draw(st.sampled_from((None, size))), seed),
        lambda: dense(rows, columns, draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))), seed),
        lambda: sherry(rows, columns, size, draw(st.sampled_from((1, 2, 16))), seed),
    ]
    return draw(st.sampled_from(kinds))()


codes = st.one_of(trit_codes(), uniform_codes(), other_codes())


def memory_of(packed: PackedLinear) -> Tensor:
    """The single operand of a packed matrix."""
    assert len(packed.operands) == 1
    return packed.operands[0].memory


def product(
    memory: Tensor, x: Tensor, precision: str = "float", threads: int = 1, onto: Tensor | None = None
) -> Tensor:
    """fw_product on x float32 [tokens, cols]."""
    rows = int(c.header_of(memory).rows)
    out = torch.full((len(x), rows), float("nan")) if onto is None else onto.clone()
    status = c.needed().product(
        memory.data_ptr(), memory.numel(), x.data_ptr(), (len(x) - 1) * x.stride(0) + x.shape[1], len(x), x.stride(0),
        out.data_ptr(), out.numel(), rows, c.PRECISIONS[precision], int(onto is not None), threads,
    )  # fmt: skip
    assert status == library.OK
    return out


def product_int8(memory: Tensor, x: Tensor, scales: Tensor, threads: int = 1) -> Tensor:
    """fw_product_int8 on x int8 [tokens, cols] with scales float32 [tokens, segments]."""
    header = c.header_of(memory)
    assert tuple(scales.shape) == (len(x), header.segments)
    out = torch.full((len(x), header.rows), float("nan"))
    status = c.needed().product_int8(
        memory.data_ptr(), memory.numel(), x.data_ptr(), x.numel(), scales.data_ptr(), scales.numel(), len(x),
        out.data_ptr(), out.numel(), header.rows, threads,
    )  # fmt: skip
    assert status == library.OK
    return out


def rows_of(memory: Tensor, first: int, last: int) -> Tensor:
    out = torch.full((last - first, int(c.header_of(memory).cols)), float("nan"))
    status = c.needed().operand_rows(memory.data_ptr(), memory.numel(), first, last, out.data_ptr(), out.numel())
    assert status == library.OK
    return out


def isas() -> list[str]:
    """The instruction sets that this processor and build have."""
    native, found = library.get(), []
    if native is None:
        return []
    with instruction_set("auto"):
        for name in ISAS:
            try:
                native.select_isa(name)
                found.append(name)
            except ValueError:
                pass
    return found


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    native = library.get()
    assert native is not None
    native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa("auto")


def magnitude(code: Code, x: Tensor) -> Tensor:
    """Sums of |w x|: what rounding errors of a product are measured by. float64 [tokens, rows].

    Of weights that are a product and an offset, those of both.
    """
    if isinstance(code, Uniform) and code.offsets is not None:
        scaled = code.replaced({"offsets": torch.zeros_like(code.offsets)})
        offsets = code.replaced({"scales": torch.zeros_like(code.scales)})
        return x.double().abs() @ (scaled.decode().double().abs() + offsets.decode().double().abs()).T
    return x.double().abs() @ code.decode().double().abs().T


def address(struct: ctypes.Structure) -> int:
    return ctypes.addressof(struct)
