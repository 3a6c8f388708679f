"""From stored codes to the layouts of `operand`: done once, at load, in PyTorch on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from featherweight.model.products.triton.operand import (
    DENSE,
    DIGITS,
    FIELDS,
    LOW_RANK,
    QUARTETS,
    ROW_TILE,
    SLICE,
    SPARSE,
    TABLE,
    GpuOperand,
    Layout,
    Step,
)
from featherweight.native.packing import unpack_bits
from featherweight.storage.codes.base import Code, code_from
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard, random_signs
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sherry import Sherry, quartets_of
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import LOG8, TritPlanes, log8_encode
from featherweight.storage.codes.uniform import Uniform

GpuPacking = Literal["base3", "2bit"]

CHUNK = 1 << 24  # weights that are repacked together: bounds the memory this takes beside the result
LARGEST = 1 << 31  # kernels count in 32 bits within an operand


def pack_for_gpu(spec: dict[str, Any], tensors: dict[str, Tensor], packing: GpuPacking = "base3") -> GpuOperand:
    """The operand of a code that is one term: no sum.

    Parameters
    ----------
    spec, tensors : those of a `Code`, as stored.
    packing : of trits, whatever they are stored in: "base3" 1.6 bits each, fewer bytes; "2bit" is decoded with
        fewer instructions, for GPUs whose arithmetic and not their memory is the limit, and has an int8 path.

    Raises
    ------
    ValueError
        the code is invalid, a sum (see `pack_terms`), too large, or of a kind that has no kernel.
    """
    operands = pack_terms(spec, tensors, packing)
    if len(operands) != 1:
        raise ValueError(f"this {spec['kind']} code has {len(operands)} terms; use pack_terms, which packs each")
    return operands[0]


def pack_terms(spec: dict[str, Any], tensors: dict[str, Tensor], packing: GpuPacking = "base3") -> list[GpuOperand]:
    """The operands whose products add up to that of a code; arguments and errors of `pack_for_gpu`."""
    if packing not in ("base3", "2bit"):
        raise ValueError(f"packing must be 'base3' or '2bit', not {packing!r}")
    return _terms(code_from(spec, tensors), packing, ())


def _terms(code: Code, packing: str, steps: tuple[Step, ...]) -> list[GpuOperand]:
    """Wrappers become steps on the input, sums several operands."""
    if isinstance(code, Sum):
        return [operand for term in code.terms for operand in _terms(term, packing, steps)]
    if isinstance(code, Permuted):
        return _terms(code.inner, packing, (*steps, Step("permute", code.order.long())))
    if isinstance(code, ColumnScaled):
        return _terms(code.inner, packing, (*steps, Step("scale", code.column_scales.float())))
    if isinstance(code, Hadamard):
        signs = random_signs(code.seed, code.shape[1])
        return _terms(code.inner, packing, (*steps, Step("hadamard", signs, code.block)))
    if isinstance(code, QuantizedInput):
        return _terms(code.inner, packing, (*steps, Step("round", None, code.group_size, code.bits)))
    return [_packed(code, packing, steps)]


def _packed(code: Code, packing: str, steps: tuple[Step, ...]) -> GpuOperand:
    if isinstance(code, TritPlanes):
        scheme, tensors, layout = _trit_planes(code, packing)
    elif isinstance(code, Uniform):
        scheme, tensors, layout = _uniform(code)
    elif isinstance(code, Codebook):
        scheme, tensors, layout = _codebook(code)
    elif isinstance(code, Sherry):
        scheme, tensors, layout = _sherry(code)
    elif isinstance(code, Dense):
        return GpuOperand(code.kind, DENSE, code.shape, {"weight": code.weight.contiguous()}, None, steps)
    elif isinstance(code, LowRank):
        left, right = code.factors()
        return GpuOperand(code.kind, LOW_RANK, code.shape, {"left": left.t().contiguous(), "right": right}, None, steps)
    elif isinstance(code, Masked | Sparse):
        rows = code.in_rows() if isinstance(code, Masked) else code
        return GpuOperand(code.kind, SPARSE, code.shape, _sliced(rows), None, steps)
    else:
        raise ValueError(f"there is no GPU operator for codes of kind {code.kind!r}; decode them to dense")
    if any(t.numel() >= LARGEST for t in tensors.values()):
        raise ValueError(f"a {code.kind} matrix {list(code.shape)} is too large for one GPU operand; split its rows")
    return GpuOperand(code.kind, scheme, code.shape, tensors, layout, steps)


# --- kinds of codes -------------------------------------------------------------------------------------------------

Parts = tuple[int, dict[str, Tensor], Layout]


def _trit_planes(code: TritPlanes, packing: str) -> Parts:
    trits = code.unpack()
    exponent = None
    scales = code.scales
    if code.scale_format == LOG8:
        scales, exponent = log8_encode(scales)
    scales = scales.unsqueeze(-1) if code.tied else scales  # [rows, groups, planes or 1]
    tensors = {"scales": _by_group(scales.movedim(-1, 0))}
    weights = code.plane_weights if code.tied else ()
    if packing == "2bit":
        zero, levels = 1, trits + 1
        if code.tied:
            zero = sum(weights)
            levels = sum(w * (plane + 1).to(torch.uint8) for w, plane in zip(weights, trits, strict=True)).unsqueeze(0)
        bits = (2 * zero).bit_length()
        bits = bits if bits != 3 else 4  # tied weights of small sum: a field of four bits is aligned
        layout = _field_layout(bits, code.shape, code.group_size, len(levels), zero, exponent)
        return FIELDS, tensors | {"codes": _fields(levels, layout)}, layout
    nine = weights == (3, 1)
    base, positions = (9, 5) if nine else (3, 5)
    digits = (3 * trits[:1] + trits[1:] + 4) if nine else trits + 1
    layout = _layout(
        code.shape,
        code.group_size,
        positions,
        bits=4 if nine else 2,
        planes=len(digits),
        zero=4 if nine else 1,
        weights=() if nine else weights,
        exponent=exponent,
    )
    packed = _elements(digits, layout, lambda runs: _fraction(runs, base), torch.int16 if nine else torch.uint8)
    return DIGITS, tensors | {"codes": packed}, layout


def _uniform(code: Uniform) -> Parts:
    if code.axis != "input":
        raise ValueError(
            "there is no GPU operator for uniform codes with groups along the output; decode them to dense"
        )
    if code.offsets is not None:
        raise ValueError("there is no GPU operator for uniform codes with offsets; decode them to dense")
    codes, zeros = code.unpack()
    layout = _field_layout(code.bits, code.shape, code.group_size, 1, 1 << (code.bits - 1), None)
    tensors = {"codes": _fields(codes.unsqueeze(0), layout), "scales": _by_group(code.scales.unsqueeze(0))}
    if not code.symmetric:
        tensors["zeros"] = _by_group(zeros.unsqueeze(0))
    return FIELDS, tensors, layout


def _codebook(code: Codebook) -> Parts:
    layout = _field_layout(code.bits, code.shape, code.group_size or code.shape[1], 1, 0, None)
    tables = _floating(code.codebooks).movedim(1, 0)  # [groups, rows, 2^bits]: a row's table lies in one piece
    tables = torch.nn.functional.pad(tables, (0, 0, 0, -code.shape[0] % ROW_TILE)).contiguous()
    return TABLE, {"codes": _fields(code.unpack().unsqueeze(0), layout), "tables": tables}, layout


def _sherry(code: Sherry) -> Parts:
    """Quartets stay whole where groups hold whole spans of them; elsewhere the trits are packed one by one."""
    span = 4 * code.lane_stride
    size = min(code.group_size, quartets_of(code.shape[1], code.lane_stride) * 4)
    if size % span:
        packed = code.unpack().unsqueeze(0), code.scales.unsqueeze(-1), code.group_size
        trits = TritPlanes.encode(*packed, scale_dtype=code.scales.dtype)
        return _trit_planes(trits, "base3")
    quartets = (code.shape[0], quartets_of(code.shape[1], code.lane_stride))
    count = quartets[0] * quartets[1]
    patterns = unpack_bits(code.patterns, count, 4).view(1, *quartets)
    signs = unpack_bits(code.signs, count, 1).view(1, *quartets)
    groups = -(-code.shape[1] // size)
    runs = _layout(quartets, size // 4, 8, bits=4, planes=1, zero=1)
    layout = Layout(2, 1, 32, size, groups, runs.group_elements, 1, 1, (), None, code.lane_stride)
    tensors = {
        "codes": _elements(patterns, runs, lambda q: _words(q, 4)[0], torch.int32),
        "signs": _elements(signs, runs, lambda q: _words(q, 1)[0], torch.uint8),
        "scales": _by_group(code.scales.unsqueeze(0)),
    }
    return QUARTETS, tensors, layout


def _sliced(code: Sparse) -> dict[str, Tensor]:
    """Slices of `SLICE` rows, each as long as its longest row: entry j of row l of a slice is at (start + j) SLICE + l.

    A warp then reads the j-th entries of its rows side by side. Padding has the value 0 and column 0.
    """
    rows = code.shape[0]
    lengths = code.row_pointers.long().diff()
    slices = -(-rows // SLICE)
    padded = torch.nn.functional.pad(lengths, (0, slices * SLICE - rows))
    starts = torch.zeros(slices + 1, dtype=torch.int64)
    starts[1:] = padded.view(slices, SLICE).amax(1).cumsum(0)
    row = torch.repeat_interleave(torch.arange(rows), lengths)
    within = torch.arange(code.entries) - code.row_pointers.long()[row]
    places = (starts[row // SLICE] + within) * SLICE + row % SLICE
    columns = torch.zeros(int(starts[-1]) * SLICE, dtype=torch.int32)
    values = torch.zeros(int(starts[-1]) * SLICE, dtype=_floating(code.values).dtype)
    columns[places] = code.columns.to(torch.int32)
    values[places] = _floating(code.values)
    return {"starts": starts.to(torch.int32), "columns": columns, "values": values}


# --- elements -------------------------------------------------------------------------------------------------------


def _layout(
    shape: tuple[int, int],
    group_size: int,
    positions: int,
    *,
    bits: int,
    planes: int,
    zero: int,
    words: int = 1,
    weights: tuple[int, ...] = (),
    exponent: int | None = None,
    quads: bool = False,
) -> Layout:
    size = min(group_size, shape[1])
    groups = -(-shape[1] // size)
    elements = -(-size // positions)
    return Layout(bits, words, positions, size, groups, elements, planes, zero, weights, exponent, quads=quads)


def _field_layout(
    bits: int, shape: tuple[int, int], group_size: int, planes: int, zero: int, exponent: int | None
) -> Layout:
    common = math.gcd(bits, 32)
    return _layout(
        shape,
        group_size,
        32 // common,
        bits=bits,
        planes=planes,
        zero=zero,
        words=bits // common,
        exponent=exponent,
        quads=bits == common,
    )


def _fields(codes: Tensor, layout: Layout) -> Tensor:
    """Codes [planes, rows, columns] to words int32 [planes, elements, words, padded rows]."""
    parts = []
    for word in range(layout.words):

        def one(runs: Tensor, word: int = word) -> Tensor:
            return _words(runs, layout.bits)[word]

        parts.append(_elements(codes, layout, one, torch.int32))
    return torch.stack(parts, 2).contiguous()


def _words(runs: Tensor, bits: int) -> list[Tensor]:
    """Codes [..., P, E] to the 32-bit words of each element, int64 [..., E]; code i has the bits from `bits` i on."""
    count = -(-runs.shape[-2] * bits // 32)
    words = [torch.zeros_like(runs[..., 0, :], dtype=torch.int64) for _ in range(count)]
    for i in range(runs.shape[-2]):
        word, shift = divmod(i * bits, 32)
        code = runs[..., i, :].long()
        words[word] |= code << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[word + 1] |= code >> (32 - shift)
    return words


def _fraction(runs: Tensor, base: int) -> Tensor:
    """Digits [..., 5, E] to fixed-point fractions of a byte (base 3) or 16 bits (base 9): [..., E]."""
    value = torch.zeros_like(runs[..., 0, :], dtype=torch.int64)
    for i in range(5):
        value = value * base + runs[..., i, :]
    whole = base**5
    return -(-(value << (8 if base == 3 else 16)) // whole)


def _elements(codes: Tensor, layout: Layout, pack: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Codes [planes, rows, columns] to [planes, elements, padded rows]; `pack` takes [..., P, E] to [..., E]."""
    planes, rows, columns = codes.shape
    padded_rows = -(-rows // ROW_TILE) * ROW_TILE
    packed = torch.zeros(planes, layout.elements, padded_rows, dtype=dtype)
    held = layout.positions * layout.group_elements
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = codes[:, first : first + step]
        count = part.shape[1]
        part = torch.nn.functional.pad(part, (0, layout.groups * layout.group_size - columns))
        part = torch.nn.functional.pad(
            part.view(planes, count, layout.groups, layout.group_size), (0, held - layout.group_size)
        )
        grouped = planes, count, layout.groups
        if layout.quads:
            quads = part.view(*grouped, layout.positions // 4, layout.group_elements, 4)
            part = quads.movedim(-1, -3).reshape(*grouped, held)
        runs = part.view(*grouped, layout.positions, layout.group_elements)
        words = pack(runs).reshape(planes, count, layout.elements)
        packed[:, :, first : first + count] = words.to(dtype).transpose(1, 2)  # wraps: the bits are what counts
    return packed


def _by_group(values: Tensor) -> Tensor:
    """[planes, rows, groups] to [planes, groups, padded rows]."""
    values = _floating(values).transpose(1, 2)
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % ROW_TILE)).contiguous()


def _floating(values: Tensor) -> Tensor:
    return values.float() if values.dtype == torch.float64 else values
