"""Dense storage of small integers: trits five or four to a byte, and values of 1 to 8 bits.

Element order is row-major over the whole matrix; rows are not padded. The formats:

* "base3": byte = sum_i (t_i + 1) 3^i over five consecutive trits, i = 0 the first; missing digits are 0; bytes are <
243. * "2bit": (t_i + 1) << 2i over four consecutive trits; missing digits are 0; the digit 3 does not occur.
* b bits: element e occupies the bits [e b, e b + b) of a little-endian bit string.

The PyTorch forms here define the formats; the native library does the same faster.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from featherweight.native import library

Packing = Literal["base3", "2bit"]

TRITS_PER_BYTE: dict[str, int] = {"base3": 5, "2bit": 4}


def packed_bytes(count: int, packing: Packing) -> int:
    """Bytes that `count` trits take."""
    return -(-count // _per_byte(packing))


def pack_trits(trits: Tensor, packing: Packing) -> Tensor:
    """Trits int8 of any shape, values -1, 0, 1, to uint8 [packed_bytes]. ValueError for other values."""
    per_byte = _per_byte(packing)
    if trits.dtype != torch.int8:
        raise ValueError(f"trits must be int8, not {trits.dtype}")
    flat = trits.reshape(-1).contiguous()
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) > 1):
        raise ValueError(f"trits must be -1, 0 or 1; found values from {int(flat.min())} to {int(flat.max())}")
    native = library.get()
    if native is not None:
        return native.pack_trits(flat, packing)
    padded = torch.full((packed_bytes(flat.numel(), packing) * per_byte,), -1, dtype=torch.int8)
    padded[: flat.numel()] = flat
    digits = (padded + 1).to(torch.uint8).reshape(-1, per_byte)
    base = 3 if packing == "base3" else 4
    packed = torch.zeros(digits.shape[0], dtype=torch.uint8)
    for i in reversed(range(per_byte)):
        packed = packed * base + digits[:, i]
    return packed


def unpack_trits(packed: Tensor, count: int, packing: Packing) -> Tensor:
    """The `count` trits, int8 [count], of packed bytes. ValueError if a byte is none or the length is wrong."""
    _check_packed(packed, packed_bytes(count, packing))
    native = library.get()
    if native is not None:
        return native.unpack_trits(packed.reshape(-1).contiguous(), count, packing)
    check_trit_bytes(packed, packing)
    return _digits(packed.reshape(-1), packing).reshape(-1)[:count] - 1


def check_trit_bytes(packed: Tensor, packing: Packing) -> None:
    """ValueError naming the first byte that no trits pack to."""
    bad = packed.reshape(-1) >= 243 if packing == "base3" else (_digits(packed.reshape(-1), packing) == 3).any(-1)
    if bool(bad.any()):
        _refuse(int(bad.to(torch.uint8).argmax()), packing)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Values uint8 < 2^bits, flattened, to uint8 [ceil(numel bits / 8)]. ValueError for larger values."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, not {bits}")
    if values.dtype != torch.uint8:
        raise ValueError(f"values must be uint8, not {values.dtype}")
    flat = values.reshape(-1).contiguous()
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"the value {int(flat.max())} does not fit into {bits} bits")
    native = library.get()
    if native is not None:
        return native.pack_bits(flat, bits)
    # Eight values fill `bits` bytes exactly, so a block of eight is one little-endian integer of at most 64 bits.
    padded = torch.zeros(-(-flat.numel() // 8), 8, dtype=torch.int64)
    padded.view(-1)[: flat.numel()] = flat.to(torch.int64)
    word = torch.zeros(len(padded), dtype=torch.int64)
    for i in range(8):
        word |= padded[:, i] << (i * bits)
    out = torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], -1)
    return out.reshape(-1)[: -(-flat.numel() * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` values, uint8 [count], of a little-endian bit string. ValueError if the length is wrong."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, not {bits}")
    _check_packed(packed, -(-count * bits // 8))
    flat = packed.reshape(-1).contiguous()
    native = library.get()
    if native is not None:
        return native.unpack_bits(flat, count, bits)
    padded = torch.zeros(-(-count // 8), bits, dtype=torch.int64)
    padded.view(-1)[: flat.numel()] = flat.to(torch.int64)
    word = torch.zeros(len(padded), dtype=torch.int64)
    for i in range(bits):
        word |= padded[:, i] << (8 * i)
    out = torch.stack([(word >> (i * bits) & (2**bits - 1)).to(torch.uint8) for i in range(8)], -1)
    return out.reshape(-1)[:count].contiguous()


def decode_trit_planes(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    group_size: int,
    packing: Packing,
    *,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """The matrix float32 [n, d] that packed planes and stored scales stand for.

    Parameters
    ----------
    packed : uint8 [K, packed_bytes(n d)].
    scales : float16, bfloat16 or float32 [n, g, K], or tied [n, g], with g = ceil(d / group_size).
    shape : (n, d).
    out : float32 [n, d], contiguous, to write into.
    threads : None for the default of `library.thread_count`.

    Free scales: ((a1 t1 + a2 t2) + a3 t3); tied: s times the integer sum_k 3^(K-1-k) t_k; both in float32 in that
    order, so the result is the same bits on every machine. ValueError for wrong shapes and for bytes that are no trits.
    """
    n, d = shape
    planes, tied, groups = packed.shape[0], scales.dim() == 2, -(-d // group_size)
    for plane in packed:
        _check_packed(plane, packed_bytes(n * d, packing))
    if tuple(scales.shape) != ((n, groups) if tied else (n, groups, planes)) or not 1 <= planes <= 3:
        raise ValueError(f"scales {list(scales.shape)} do not fit {planes} planes [{n}, {d}] in groups of {group_size}")
    if out is None:
        out = torch.empty(n, d, dtype=torch.float32)
    elif tuple(out.shape) != (n, d) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 [{n}, {d}]")
    native = library.get()
    if native is not None:
        return native.decode_trit_planes(packed.contiguous(), scales.contiguous(), group_size, packing, out, threads)
    return out.copy_(decode_trit_planes_reference(packed, scales, shape, group_size, packing))


def decode_trit_planes_reference(
    packed: Tensor, scales: Tensor, shape: tuple[int, int], group_size: int, packing: Packing
) -> Tensor:
    """`decode_trit_planes` in PyTorch, without checks of shapes."""
    n, d = shape
    check_trit_bytes(packed, packing)
    planes = [_digits(p, packing).reshape(-1)[: n * d].reshape(n, d).to(torch.float32) - 1 for p in packed]
    group = torch.arange(d) // group_size
    values = scales.to(torch.float32)
    if scales.dim() == 2:
        code = planes[0]
        for plane in planes[1:]:
            code = code * 3 + plane
        return values[:, group] * code
    total = values[:, group, 0] * planes[0]
    for k in range(1, len(planes)):
        total = total + values[:, group, k] * planes[k]
    return total


def _per_byte(packing: str) -> int:
    if packing not in TRITS_PER_BYTE:
        raise ValueError(f"packing must be 'base3' or '2bit', not {packing!r}")
    return TRITS_PER_BYTE[packing]


def _digits(packed: Tensor, packing: Packing) -> Tensor:
    """Digits t + 1 as int8 [bytes, trits a byte]."""
    if packing == "base3":
        return torch.stack([(packed // 3**i % 3).to(torch.int8) for i in range(5)], -1)
    return torch.stack([(packed >> (2 * i) & 3).to(torch.int8) for i in range(4)], -1)


def _check_packed(packed: Tensor, expected: int) -> None:
    if packed.dtype != torch.uint8 or packed.numel() != expected or math.prod(packed.shape) != packed.numel():
        raise ValueError(f"packed data must be {expected} bytes of uint8, not {packed.numel()} of {packed.dtype}")


def _refuse(index: int, packing: Packing) -> None:
    raise ValueError(f"byte {index} of packed trits is not valid {packing}")
