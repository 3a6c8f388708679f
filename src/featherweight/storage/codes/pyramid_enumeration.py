"""Numbering of the points of the pyramid P(D, K) = {y integer : sum |y_i| = K} (Fischer 1986; the CWRS of RFC 6716).

Points are ordered by their first coordinate, in the order 0, +1, -1, +2, -2, ..., then by the second, and so on. The
index of a point is the count of those before it; the zero vector, which is no point, gets the index N(D, K) behind the
last one. Counts exceed 64 bits soon, so indices are held in *limbs*: one of 63 bits while they fit, several of 31 bits
otherwise, the lowest first.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ONE_LIMB_BITS = 63
WINDOW_BITS = 57  # with up to 7 bits before it, within eight bytes
CHUNK = 1 << 14  # indices packed at once; a multiple of 8, so that chunks are whole bytes
LIMB_BITS = 31  # sums of up to 2^32 limbs stay within int64


@lru_cache(maxsize=64)
def count_table(dimension: int, pulses: int) -> tuple[tuple[int, ...], ...]:
    """N(d, k) for d = 0 .. `dimension`, k = 0 .. `pulses`: N(d, k) = N(d-1, k) + N(d, k-1) + N(d-1, k-1)."""
    rows = [(1, *[0] * pulses)]
    for _ in range(dimension):
        above, row = rows[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[k - 1] + above[k - 1])
        rows.append(tuple(row))
    return tuple(rows)


@lru_cache(maxsize=64)
def point_count(dimension: int, pulses: int) -> int:
    """N(D, K), the number of points; without the table, whose numbers may have thousands of bits each."""
    row = [1, *[0] * pulses]
    for _ in range(dimension):
        above = row[0]
        for k in range(1, pulses + 1):
            above, row[k] = row[k], row[k] + row[k - 1] + above
    return row[pulses]


def index_bits(dimension: int, pulses: int) -> int:
    """Bits that hold the N(D, K) + 1 indices: log2 N(D, K) rounded up, one more where N(D, K) is a power of two."""
    return point_count(dimension, pulses).bit_length()


class Tables(NamedTuple):
    """For a coordinate with d more behind it and k pulses left for it and those, in limbs; row d (K + 1) + k.

    The points before the first with magnitude m > 0 here number `offsets`[d, k] - `doubles`[d, k - m].
    """

    counts: Tensor  # int64 [D (K+1), L], N(d, k): points with one value of this coordinate
    doubles: Tensor  # int64 [D (K+1), L], 2 (N(d, 0) + ... + N(d, k))
    offsets: Tensor  # int64 [D (K+1), L], N(d, k) + 2 (N(d, 0) + ... + N(d, k-1))
    total: Tensor  # int64 [L], N(D, K)
    limb_bits: int


@lru_cache(maxsize=16)
def tables(dimension: int, pulses: int) -> Tables:
    """The tables of P(D, K)."""
    bits = index_bits(dimension, pulses)
    limb_bits = ONE_LIMB_BITS if bits <= ONE_LIMB_BITS else LIMB_BITS
    limbs = -(-bits // limb_bits)
    rows = count_table(dimension, pulses)
    counts = [n for row in rows[:dimension] for n in row]
    sums = [n for row in rows[:dimension] for n in accumulate(row)]
    return Tables(
        _limbs(counts, limbs, limb_bits),
        _limbs([2 * n for n in sums], limbs, limb_bits),
        _limbs([2 * n - count for n, count in zip(sums, counts, strict=True)], limbs, limb_bits),
        _limbs([rows[dimension][pulses]], limbs, limb_bits)[0],
        limb_bits,
    )


def _limbs(numbers: list[int], limbs: int, limb_bits: int) -> Tensor:
    # Entries beyond the largest index are never used; their low bits are as good as any.
    mask = (1 << limb_bits) - 1
    parts = [[n >> (i * limb_bits) & mask for i in range(limbs)] for n in numbers]
    return torch.tensor(parts, dtype=torch.int64, device="cpu")


def point_indices(points: Tensor, pulses: int) -> Tensor:
    """Indices, int64 limbs [count, L], of integer vectors [count, D] that are points of P(D, K) or zero."""
    count, dimension = points.shape
    table = tables(dimension, pulses)
    codes = torch.zeros(count, table.total.shape[0], dtype=torch.int64)
    left = torch.full((count,), pulses, dtype=torch.int64)
    for position in range(dimension):
        row = (dimension - 1 - position) * (pulses + 1)
        value = points[:, position].long()
        behind = (left - value.abs()).clamp(min=0)  # below 0 for the zero vector only, if at all
        codes += _start(table, row, left, behind)
        codes += table.counts[row + behind] * (value < 0).unsqueeze(1)
        left = behind
    zero = (points == 0).all(1, keepdim=True)
    return torch.where(zero, table.total, _carried(codes, table.limb_bits))


def indexed_points(codes: Tensor, dimension: int, pulses: int) -> Tensor:
    """The integer vectors int64 [count, D] with these indices. ValueError for an index above N(D, K)."""
    table = tables(dimension, pulses)
    zero = (codes == table.total).all(1)
    if bool((_at_least_zero(codes - table.total, table.limb_bits) & ~zero).any()):
        raise ValueError(f"an index is not below the {dimension}-dimensional pyramid's count of points")
    rest = codes.masked_fill(zero.unsqueeze(1), 0)
    if _fits_searches(dimension, pulses):
        return _searched_points(rest.squeeze(1), dimension, pulses).masked_fill(zero.unsqueeze(1), 0)
    return _bisected_points(rest, dimension, pulses).masked_fill(zero.unsqueeze(1), 0)


class Search(NamedTuple):
    """All values of one coordinate for all numbers k of pulses left, in order of `keys` = k 2^bits + start."""

    keys: Tensor  # int64 [(K+1)^2], ascending
    values: Tensor  # int64 [(K+1)^2]


def _fits_searches(dimension: int, pulses: int) -> bool:
    return index_bits(dimension, pulses) + pulses.bit_length() <= ONE_LIMB_BITS


@lru_cache(maxsize=16)
def _searches(dimension: int, pulses: int) -> tuple[Search, ...]:
    """The searches of the coordinates, first to last."""
    bits = index_bits(dimension, pulses)
    searches = []
    for row in reversed(count_table(dimension, pulses)[:dimension]):
        keys, values = [], []
        for k in range(pulses + 1):
            start = k << bits
            for m in range(k + 1):
                for value in (m, -m) if m else (0,):
                    if row[k - m]:  # the last coordinate takes all pulses that are left
                        keys.append(start)
                        values.append(value)
                    start += row[k - m]
        searches.append(Search(torch.tensor(keys, device="cpu"), torch.tensor(values, device="cpu")))
    return tuple(searches)


def _searched_points(rest: Tensor, dimension: int, pulses: int) -> Tensor:
    """`indexed_points` by one binary search a coordinate; for indices that leave room for k in 63 bits."""
    bits = index_bits(dimension, pulses)
    key = rest + (pulses << bits)
    columns = []
    for search in _searches(dimension, pulses):
        place = torch.searchsorted(search.keys, key, right=True) - 1
        value = search.values[place]
        columns.append(value)
        left = (key >> bits) - value.abs()
        key = key - search.keys[place] + (left << bits)
    return torch.stack(columns, 1)


def _bisected_points(rest: Tensor, dimension: int, pulses: int) -> Tensor:
    """`indexed_points` for indices of any size."""
    table = tables(dimension, pulses)
    left = torch.full((len(rest),), pulses, dtype=torch.int64)
    points = torch.zeros(len(rest), dimension, dtype=torch.int64)
    for position in range(dimension):
        row = (dimension - 1 - position) * (pulses + 1)
        behind = _behind(rest, table, row, left, pulses)
        rest = _carried(rest - _start(table, row, left, behind), table.limb_bits)
        one = table.counts[row + behind]
        negative = _at_least_zero(rest - one, table.limb_bits) & (behind < left)
        rest = _carried(rest - one * negative.unsqueeze(1), table.limb_bits)
        points[:, position] = torch.where(negative, behind - left, left - behind)
        left = behind
    return points


def _start(table: Tables, row: int, left: Tensor, behind: Tensor) -> Tensor:
    """Points before the first that leaves `behind` of `left` pulses; limbs may be negative."""
    return (table.offsets[row + left] - table.doubles[row + behind]) * (behind < left).unsqueeze(1)


def _behind(rest: Tensor, table: Tables, row: int, left: Tensor, pulses: int) -> Tensor:
    """Pulses behind a coordinate: the fewest whose points start at or before `rest`, by bisection."""
    low, high = torch.zeros_like(left), left.clone()
    for _ in range(pulses.bit_length()):
        middle = (low + high) // 2
        fits = _at_least_zero(rest - _start(table, row, left, middle), table.limb_bits)
        low, high = torch.where(fits, low, torch.minimum(middle + 1, high)), torch.where(fits, middle, high)
    return high


def _carried(codes: Tensor, limb_bits: int) -> Tensor:
    """Limbs within [0, 2^limb_bits) again, after sums and differences."""
    if codes.shape[1] == 1:
        return codes
    carried, carry = [], torch.zeros_like(codes[:, 0])
    for limb in codes.unbind(1):
        total = limb + carry
        carried.append(total & ((1 << limb_bits) - 1))
        carry = total >> limb_bits
    return torch.stack(carried, 1)


def _at_least_zero(difference: Tensor, limb_bits: int) -> Tensor:
    """Whether a number of signed limbs is not negative: bool [count]."""
    carry = torch.zeros_like(difference[:, 0])
    for limb in difference.unbind(1)[:-1]:
        carry = (limb + carry) >> limb_bits
    return difference[:, -1] + carry >= 0


def pack_indices(codes: Tensor, bits: int, limb_bits: int) -> Tensor:
    """Indices [count, L] as a little-endian bit string of `bits` bits each: uint8 [ceil(count bits / 8)]."""
    pieces = []
    for chunk in torch.split(codes, CHUNK):
        places = torch.arange(bits)
        digits = chunk[:, places // limb_bits] >> (places % limb_bits) & 1
        flat = digits.to(torch.uint8).reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        pieces.append((flat << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return torch.cat(pieces)


def unpack_indices(packed: Tensor, count: int, bits: int, limb_bits: int) -> Tensor:
    """The `count` indices of a bit string, int64 limbs [count, L]."""
    if bits <= WINDOW_BITS:
        return _unpack_windows(packed, count, bits)
    limbs = -(-bits // limb_bits)
    codes = torch.zeros(count, limbs, dtype=torch.int64)
    for first in range(0, count, CHUNK):
        last = min(count, first + CHUNK)
        window = packed[first * bits // 8 : -(-last * bits // 8)]
        digits = (window.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).reshape(-1)
        digits = digits[: (last - first) * bits].view(last - first, bits)
        for limb in range(limbs):
            part = digits[:, limb * limb_bits : (limb + 1) * limb_bits].long()
            codes[first:last, limb] = (part << torch.arange(part.shape[1])).sum(1)
    return codes


def _unpack_windows(packed: Tensor, count: int, bits: int) -> Tensor:
    """`unpack_indices` for indices that lie within eight bytes: int64 [count, 1]."""
    padded = torch.nn.functional.pad(packed, (0, 8))
    places = torch.arange(count) * bits
    words = torch.zeros(count, dtype=torch.int64)
    for i in range(8):
        words |= padded[(places >> 3) + i].long() << (8 * i)
    return (words >> (places & 7) & ((1 << bits) - 1)).unsqueeze(1)
