"""Products of small integers by bit planes (FlexQ, arXiv 2508.04405): the reference of what such a kernel computes.

A two's-complement integer of b bits is q = -2^(b-1) t_(b-1) + sum_(p < b-1) 2^p t_p with bits t. A product of two
matrices is therefore a sum over pairs of planes of +-2^(p+q) popcount(and), negative where exactly one of the two is
its operand's sign plane.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLICE = 128  # columns of one step of the kernel
CHUNK = 8  # rows whose planes lie together
WORDS = SLICE // 32


def bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Planes uint8 [bits, ...] in {0, 1} of whole numbers in [-2^(bits-1), 2^(bits-1)). ValueError for others."""
    values = codes.long()
    if values.numel() and (int(values.min()) < -(1 << (bits - 1)) or int(values.max()) >= 1 << (bits - 1)):
        raise ValueError(f"codes from {int(values.min())} to {int(values.max())} do not fit into {bits} bits")
    return torch.stack([(values >> p & 1).to(torch.uint8) for p in range(bits)])


def plane_weight(plane: int, bits: int) -> int:
    """What a bit of this plane counts: 2^plane, negative for the sign plane."""
    return -(1 << plane) if plane == bits - 1 else 1 << plane


def from_bit_planes(planes: Tensor) -> Tensor:
    """The inverse of `bit_planes`: int64 [...]."""
    bits = len(planes)
    return sum((plane_weight(p, bits) * planes[p].long() for p in range(bits)), torch.zeros((), dtype=torch.int64))


def bit_plane_product(weight: Tensor, inputs: Tensor, weight_bits: int, input_bits: int) -> Tensor:
    """X W^T by plane pairs: int64 [tokens, out] from integer W [out, in] and X [tokens, in]."""
    weight_planes = bit_planes(weight, weight_bits).double()  # counts below 2^53 are exact in float64
    input_planes = bit_planes(inputs, input_bits).double()
    total = torch.zeros(inputs.shape[0], weight.shape[0], dtype=torch.int64)
    for p in range(weight_bits):
        for q in range(input_bits):
            counts = (input_planes[q] @ weight_planes[p].T).long()  # popcount(and) of every row pair
            total += plane_weight(p, weight_bits) * plane_weight(q, input_bits) * counts
    return total


def grouped_product(
    weight: Tensor,
    weight_scales: Tensor,
    inputs: Tensor,
    input_scales: Tensor,
    weight_bits: int,
    input_bits: int,
    *,
    group_size: int = SLICE,
) -> Tensor:
    """The layer's output float32 [tokens, out]: integer products of each group times both scales, summed in float32.

    weight : integer [out, in]; weight_scales : [out, groups]; inputs : integer [tokens, in]; input_scales : float32
    [tokens, groups]. The scales are multiplied in float32: their product may be below the range of float16.
    """
    total = torch.zeros(inputs.shape[0], weight.shape[0], dtype=torch.float32)
    for group in range(weight_scales.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        counts = bit_plane_product(weight[:, part], inputs[:, part], weight_bits, input_bits)
        total += counts.float() * (input_scales[:, group, None].float() * weight_scales[:, group].float())
    return total


def pack_bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] as int32 [columns / 128, rows / 8, bits, 8, 4], both rounded up, zeros in the padding.

    Word w of a row of a plane holds columns 32 w to 32 w + 31 of the slice, the first in the highest bit.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes.long(), (0, -columns % SLICE, 0, -rows % CHUNK))
    planes = bit_planes(padded, bits).long().view(bits, -1, CHUNK, padded.shape[1] // SLICE, WORDS, 32)
    words = (planes << torch.arange(31, -1, -1)).sum(-1)  # [bits, chunks, 8, slices, words]
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.permute(3, 1, 0, 2, 4).contiguous()


def unpack_bit_planes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_bit_planes`: int64 [rows, columns]."""
    words = packed.long().permute(2, 1, 3, 0, 4)  # [bits, chunks, 8, slices, words]
    planes = words.unsqueeze(-1) >> torch.arange(31, -1, -1) & 1
    flat = planes.reshape(len(planes), packed.shape[1] * CHUNK, packed.shape[0] * SLICE)
    return from_bit_planes(flat)[:rows, :columns]
