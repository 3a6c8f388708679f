"""The operators in PyTorch: what the native and GPU kernels are held to.

Operands are read from their bytes alone (native/product.h and product_layout.h say what lies where), without the native
library. Speed is no aim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.model.products.structs import LAYOUT_NAMES, Header, header_of
from featherweight.storage.codes.hadamard import hadamard_transform
from featherweight.storage.codes.sherry import QUARTETS
from featherweight.storage.codes.trit_planes import log8_decode

TILE_ROWS, LANE_BYTES = 16, 4
STEP_BYTES = TILE_ROWS * LANE_BYTES
TRITS_A_VECTOR, TRIT_ESCAPE = 5, 216
QUARTETS_A_UNIT = 32
LOG8, INT8 = 4, 5
SMALLEST_SCALE = torch.tensor(1e-35, device="cpu")  # the inverse of smaller ones is not finite
SMALLEST_STEP, LARGEST_STEP = 1e-5, 1e4  # of `codes.quantized_input`
SPLIT_CODES = {
    3: (((0, 6), (0, 7), (1, 6)), ((1, 7), (2, 6), (2, 7))),
    5: (
        ((0, 5), (0, 6), (0, 7), (1, 5), (1, 6)),
        ((2, 5), (2, 6), (2, 7), (3, 5), (3, 6)),
        ((4, 5), (4, 6), (4, 7), (1, 7), (3, 7)),
    ),
    6: (((0, 6), (0, 7), (1, 6), (1, 7), (2, 6), (2, 7)),),
    7: (tuple((vector, 7) for vector in range(7)),),
}
"""By bits of a code, for each of the last codes of a unit: vector and bit in its bytes, from the lowest bit up."""
DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, INT8: torch.int8}


@dataclass(frozen=True)
class Parts:
    """What an operand of integers holds: W = sum over k of scales[k] (integers[k] - zeros), per group of columns, and
    then plus `offsets` where there are any.

    integers int64 [planes, rows, cols], scales float32 [planes, rows, groups], zeros int64 [rows, groups], offsets
    float32 [rows, groups]; `group` and `segment` int64 [cols] say to which group and segment a column belongs.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    segment: Tensor
    offsets: Tensor | None = None


def decode_operand(memory: Tensor) -> Tensor:
    """The matrix float32 [rows, cols] of an operand uint8 [bytes]."""
    header = header_of(memory)
    layout = LAYOUT_NAMES.get(header.layout)
    if layout == "plain":
        return _plain(memory, header)
    if layout == "tables":
        return _tables(memory, header)
    parts = read_parts(memory)
    centred = parts.integers - parts.zeros[:, parts.group]
    total = parts.scales[0][:, parts.group] * centred[0].float()
    for k in range(1, len(centred)):
        total = total + parts.scales[k][:, parts.group] * centred[k].float()
    return total if parts.offsets is None else total + parts.offsets[:, parts.group]


def read_parts(memory: Tensor) -> Parts:
    """Integers and scales of an operand whose layout is fields, trits or quartets."""
    header = header_of(memory)
    layout = LAYOUT_NAMES.get(header.layout)
    if layout not in ("fields", "trits", "quartets"):
        raise ValueError(f"an operand in the layout {layout!r} holds no integers with scales")
    codes = _tiled(memory, header.codes_at, header.codes_per_tile, header)
    read = {"fields": _fields, "trits": _trits, "quartets": _quartets}[layout]
    integers = read(codes, header)[..., _positions(header)]  # [planes, rows, cols]
    zeros = torch.full((header.rows, header.groups), header.offset, dtype=torch.int64)
    if layout != "fields":
        zeros.zero_()  # trits are read as -1, 0, 1
    if header.has_zeros:
        zeros = _tiled(memory, header.zeros_at, header.zeros_per_tile, header).long().view(header.tiles, -1, TILE_ROWS)
        zeros = _by_row(zeros[:, : header.groups], header)
    planes = 1 if header.tied else header.planes
    scales = _scales(memory, header.scales_at, header.scales_per_tile, planes, header)
    offsets = None
    if header.has_offsets:
        offsets = _scales(memory, header.zeros_at, header.zeros_per_tile, 1, header)[0]
    if header.tied and layout == "trits":  # in fields they are one integer already
        weights = torch.tensor(list(header.weights)[: header.planes])
        integers = (integers * weights.view(-1, 1, 1)).sum(0, keepdim=True)
    segment = torch.arange(header.cols) // header.segment
    return Parts(integers, scales, zeros, segment // header.segments_per_group, segment, offsets)


def matmul(x: Tensor, memory: Tensor, precision: str = "float") -> Tensor:
    """x [..., cols] times the transposed operand: [..., rows] in the dtype of x, sums in float64.

    With precision "int8" x is rounded as `quantize` does, per segment of the operand, or to bfloat16 where the operand
    is a matrix of that type; operands of tables or other plain values take x as it is.
    """
    header = header_of(memory)
    if precision == "int8" and LAYOUT_NAMES.get(header.layout) in ("fields", "trits", "quartets"):
        codes, scales, _ = quantize(x.float().reshape(-1, header.cols), header.segment)
        out = matmul_int8(codes, scales, memory)
    else:
        if precision == "int8" and rounds_to_bfloat16(header):
            x = x.bfloat16().to(x.dtype)
        out = x.double().reshape(-1, header.cols) @ decode_operand(memory).double().T
    return out.to(x.dtype).view(*x.shape[:-1], header.rows)


def rounds_to_bfloat16(header: Header) -> bool:
    """Whether products of precision "int8" with this operand round their inputs to bfloat16."""
    return LAYOUT_NAMES.get(header.layout) == "plain" and DTYPES[header.scale_dtype] == torch.bfloat16


def matmul_int8(codes: Tensor, scales: Tensor, memory: Tensor) -> Tensor:
    """Activations int8 [tokens, cols] with scales [tokens, segments]: float64 [tokens, rows], integer sums exact."""
    parts, segments = read_parts(memory), scales.shape[1]
    out = torch.zeros(len(codes), parts.integers.shape[1], dtype=torch.float64)
    for s in range(segments):
        inside = parts.segment == s
        group = int(parts.group[inside][0])
        centred = parts.integers[:, :, inside] - parts.zeros[:, group : group + 1]
        for k in range(len(centred)):
            sums = codes[:, inside].long() @ centred[k].T  # exact
            out += scales[:, s : s + 1].double() * parts.scales[k][:, group].double() * sums.double()
        if parts.offsets is not None:
            sums = codes[:, inside].sum(1, keepdim=True, dtype=torch.int64)
            out += scales[:, s : s + 1].double() * parts.offsets[:, group].double() * sums.double()
    return out


def quantize(x: Tensor, segment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [..., cols], scales float32 and sums int32 [..., segments] of x [..., cols].

    In float32: scale = max|x| / 127; codes = x (127 / max|x|) to the nearest integer, halves to even. A segment whose
    scale would be 1e-35 or less has scale 0, one with a NaN or Inf scale NaN; both have codes 0.
    """
    columns, segment = x.shape[-1], min(segment, x.shape[-1])
    padded = torch.nn.functional.pad(x.float(), (0, -columns % segment))
    parts = padded.view(*x.shape[:-1], padded.shape[-1] // segment, segment)
    largest = parts.abs().amax(-1)
    good = torch.isfinite(largest) & (largest / 127 > SMALLEST_SCALE)
    scales = torch.where(good, largest / 127, torch.where(torch.isfinite(largest), 0.0, torch.nan))
    inverse = torch.full_like(largest, 127.0) / torch.where(good, largest, 1.0)  # 127 / x would be 127 times 1 / x
    codes = torch.where(good.unsqueeze(-1), (parts * inverse.unsqueeze(-1)).round().clamp(-127, 127), 0.0)
    codes = codes.to(torch.int8)
    return codes.flatten(-2)[..., :columns].contiguous(), scales, codes.sum(-1, dtype=torch.int32)


def hadamard(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    """T x of `codes.hadamard` for x [..., cols]: signs [cols] first, then the transform of each `block` columns."""
    return hadamard_transform(x if signs is None else x * signs.to(x.dtype), block)


def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor, precision: str = "float") -> Tensor:
    """x [..., cols] through the operands `right` [r, cols] and `left` [rows, r]: [..., rows] in the dtype of x."""
    return matmul(matmul(x.float(), right, precision), left, precision).to(x.dtype)


def sparse_matmul(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x [..., cols] times a sparse matrix in compressed rows: [..., rows] in the dtype of x."""
    rows = torch.repeat_interleave(torch.arange(len(row_pointers) - 1), row_pointers.long().diff())
    products = x.double()[..., columns.long()] * values.double()
    out = torch.zeros(*x.shape[:-1], len(row_pointers) - 1, dtype=torch.float64)
    return out.index_add_(-1, rows, products).to(x.dtype)


def rounded(x: Tensor, bits: int, group_size: int) -> Tensor:
    """x [..., cols] rounded to `bits` bits with a step per `group_size` columns, see docs/format.md: float32."""
    columns, size, top = x.shape[-1], min(group_size, x.shape[-1]), (1 << (bits - 1)) - 1
    padded = torch.nn.functional.pad(x.float(), (0, -columns % size))
    groups = padded.view(*x.shape[:-1], padded.shape[-1] // size, size)
    steps = (groups.abs().amax(-1, keepdim=True) / top).clamp(SMALLEST_STEP, LARGEST_STEP).half().float()
    codes = (groups / steps).round().clamp(-top - 1, top)
    return (codes * steps).flatten(-2)[..., :columns].contiguous()


def _tiled(memory: Tensor, at: int, per_tile: int, header: Header) -> Tensor:
    return memory[at : at + header.tiles * per_tile].view(header.tiles, per_tile)


def _by_row(values: Tensor, header: Header) -> Tensor:
    """[tiles, n, 16] to [rows, n]."""
    return values.transpose(1, 2).reshape(header.tiles * TILE_ROWS, -1)[: header.rows]


def _scales(memory: Tensor, at: int, per_tile: int, planes: int, header: Header) -> Tensor:
    """float32 [planes, rows, groups]: scales, or offsets, which are of the same type."""
    raw = _tiled(memory, at, per_tile, header)
    if header.scale_dtype == LOG8:
        values = log8_decode(raw, header.scale_exponent)
    else:
        values = raw.view(DTYPES[header.scale_dtype]).float()
    values = values[:, : header.groups * planes * TILE_ROWS].view(header.tiles, header.groups * planes, TILE_ROWS)
    by_row: Tensor = _by_row(values, header).view(header.rows, header.groups, planes)
    return by_row.permute(2, 0, 1)


def _positions(header: Header) -> Tensor:
    """Where each column stands among the padded ones of all segments: int64 [cols]."""
    column, size, stride = torch.arange(header.cols), int(header.segment), int(header.lane_stride)
    segment, within = column // size, column % size
    if LAYOUT_NAMES[header.layout] == "quartets" and stride > 1:
        span, inside = within // (4 * stride), within % (4 * stride)
        within = span * 4 * stride + inside % stride * 4 + inside // stride
    return segment * (int(header.steps) * LANE_BYTES) + within


def _from_steps(steps: Tensor, header: Header) -> Tensor:
    """[tiles, planes, steps, 64] of all segments to [planes, rows, padded columns]."""
    tiles, planes, count, _ = steps.shape
    lanes = steps.view(tiles, planes, count, TILE_ROWS, LANE_BYTES).permute(1, 0, 3, 2, 4)
    rows = int(header.rows)
    return lanes.reshape(planes, tiles * TILE_ROWS, count * LANE_BYTES)[:, :rows].long()


def field_steps(units: Tensor, bits: int) -> Tensor:
    """Units [..., bytes of a unit] of vectors of `width` bytes, the width following from the size: [..., steps, width].

    Each byte of a vector has as many whole codes as fit, from its lowest bits up; the bits above belong to the codes
    that are left: see SPLIT_CODES.
    """
    steps = unit_steps(bits)
    width = units.shape[-1] * 8 // (steps * bits)
    vectors = units.view(*units.shape[:-1], steps * bits // 8, width)
    whole = 8 // bits
    codes = torch.stack([vectors >> (bits * i) & ((1 << bits) - 1) for i in range(whole)], -2).flatten(-3, -2)
    split = []
    for places in SPLIT_CODES.get(bits, ()):
        ones = [(vectors[..., vector, :] >> place & 1) << i for i, (vector, place) in enumerate(places)]
        split.append(torch.stack(ones).sum(0, dtype=torch.uint8))
    return torch.cat([codes, torch.stack(split, -2)], -2) if split else codes


def unit_steps(bits: int) -> int:
    """Steps of a unit, the fewest that fill whole bytes: 8 for odd numbers of bits, 4 for 2 and 6, 2 for 4, 1 for 8."""
    return 1 if bits == 8 else 8 if bits & 1 else 4 if bits & 2 else 2


def _fields(codes: Tensor, header: Header) -> Tensor:
    per_step, whole, unit = STEP_BYTES * header.bits // 8, header.segments - 1, unit_steps(header.bits)
    before = whole * header.planes * header.steps * per_step
    after = header.planes * header.last_steps * per_step
    runs = []  # [tiles, planes, steps, 64] of the segments before the last one, and of that one
    for own, segments, steps in (
        (codes[:, :before], whole, header.steps),
        (codes[:, before : before + after], 1, header.last_steps),
    ):
        units = own.reshape(header.tiles, segments, header.planes, steps // unit, unit * per_step)
        found = field_steps(units, header.bits).transpose(1, 2)  # [tiles, planes, segments, units, steps, 64]
        runs.append(found.reshape(header.tiles, header.planes, segments * steps, STEP_BYTES))
    missing = header.steps - header.last_steps
    runs.append(torch.zeros(header.tiles, header.planes, missing, STEP_BYTES, dtype=torch.uint8))
    return _from_steps(torch.cat(runs, 2), header)


def _trits(codes: Tensor, header: Header) -> Tensor:
    count = header.segments * header.steps
    vectors = -(-count // TRITS_A_VECTOR)
    own = codes[:, : vectors * header.planes * STEP_BYTES].reshape(header.tiles, vectors, header.planes, STEP_BYTES)
    byte = own.transpose(1, 2).to(torch.int16)
    escaped = byte >= TRIT_ESCAPE
    low, high = torch.where(escaped, byte - TRIT_ESCAPE, byte >> 3), torch.where(escaped, 8, byte & 7)
    digits = [low % 3, low // 3 % 3, low // 9, 2 - high % 3, 2 - high // 3]
    steps = torch.stack(digits, 3).reshape(header.tiles, header.planes, -1, STEP_BYTES)[:, :, :count]
    return _from_steps(steps, header) - 1


def _quartets(codes: Tensor, header: Header) -> Tensor:
    units = header.segments * header.steps // QUARTETS_A_UNIT
    words = codes[:, : units * 5 * STEP_BYTES].reshape(header.tiles, units, 5, TILE_ROWS, 4).long()
    bits = torch.stack([words >> i & 1 for i in range(8)], -1)  # [tiles, units, words, rows, bytes, bits]
    bits = bits.permute(0, 3, 1, 2, 4, 5).reshape(header.tiles * TILE_ROWS, units * QUARTETS_A_UNIT, 5)
    joint = (bits << torch.arange(5)).sum(-1)
    return QUARTETS[joint].reshape(1, header.tiles * TILE_ROWS, -1)[:, : header.rows].long()


def _tables(memory: Tensor, header: Header) -> Tensor:
    codes = _tiled(memory, header.codes_at, header.codes_per_tile, header)
    lanes = 16
    steps = header.segments * header.steps * LANE_BYTES // lanes // header.groups  # of a group
    own = codes.reshape(header.tiles * TILE_ROWS, -1)[: header.rows, : header.groups * steps * lanes * header.bits // 8]
    own = own.reshape(header.rows, header.groups, steps // unit_steps(header.bits), -1)
    values = field_steps(own, header.bits).reshape(header.rows, header.groups, -1).long()
    tables = _tiled(memory, header.scales_at, header.scales_per_tile, header).view(torch.float32)
    tables = tables.reshape(header.tiles * TILE_ROWS, -1)[: header.rows].view(header.rows, header.groups, -1)
    size = header.segment * header.segments_per_group
    return tables.gather(2, values)[:, :, :size].reshape(header.rows, -1)[:, : header.cols]


def _plain(memory: Tensor, header: Header) -> Tensor:
    values = _tiled(memory, header.codes_at, header.codes_per_tile, header).view(DTYPES[header.scale_dtype])
    together = 2 if values.dtype == torch.bfloat16 else 1  # neighbours of a row
    columns = values.view(header.tiles, -1, TILE_ROWS, together).transpose(1, 2)
    return columns.reshape(header.tiles * TILE_ROWS, -1)[: header.rows, : header.cols].float()
