"""Levels of a sum of binary planes: all +-a_1 +-a_2 ... of a group's scales, and the signs that make them."""

from __future__ import annotations

import torch
from torch import Tensor


def sign_patterns(planes: int) -> Tensor:
    """The signs of every joint code: float32 [2^planes, planes], the first plane changing slowest; in main memory."""
    codes = torch.arange(1 << planes, device="cpu").unsqueeze(-1)
    return ((codes >> torch.arange(planes - 1, -1, -1, device="cpu")) & 1).float() * 2 - 1


def combinations(scales: Tensor) -> Tensor:
    """The value of every joint code for scales [..., planes]: [..., 2^planes], added up from the first plane on."""
    patterns = sign_patterns(scales.shape[-1]).to(scales)
    total = scales[..., :1] * patterns[:, 0]
    for k in range(1, scales.shape[-1]):
        total = total + scales[..., k : k + 1] * patterns[:, k]
    return total


def signs_of_levels(indices: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The planes, int8 [planes, out, in] of -1 and 1, of levels counted in ascending order.

    indices : uint8 [out, in]
    scales : float32 [out, groups, planes]
    """
    rows, columns = indices.shape
    order = combinations(scales).argsort(dim=-1, stable=True)  # the joint code at each level [out, groups, 2^planes]
    groups, size = order.shape[1], min(group_size, columns)
    padded = torch.nn.functional.pad(indices, (0, groups * size - columns)).view(rows, groups, size)
    codes = order.to(torch.uint8).gather(-1, padded.long()).view(rows, -1)[:, :columns]
    planes = scales.shape[-1]
    return torch.stack([((codes >> (planes - 1 - k)) & 1).to(torch.int8) * 2 - 1 for k in range(planes)])
