"""Scores of whole blocks (layer-wise quantisation, arXiv 2406.17415), by which a top-N order gives out bits.

LIM_i = -mean_t cos(h_in(t), h_out(t))            hidden states before and after block i; higher is more important
ZD_i  = share of z > 1, z = (w - mu_i) / sigma_i  all weights of the block together; lower is more important
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def lim_of(states: Iterable[Sequence[Tensor]]) -> list[float]:
    """LIM of every block.

    states : for each window the hidden states [T, hidden] before the first block and behind every block
    """
    sums: list[float] = []
    tokens = 0
    for window in states:
        sums = sums or [0.0] * (len(window) - 1)
        tokens += window[0].shape[0]
        for number, (before, behind) in enumerate(zip(window, window[1:], strict=False)):
            cosine = torch.nn.functional.cosine_similarity(before.float(), behind.float(), dim=-1)
            sums[number] += float(cosine.sum(dtype=torch.float64))
    return [-total / max(1, tokens) for total in sums]


def zd_of(weights: Sequence[Callable[[], Tensor]], threshold: float = 1.0, two_sided: bool = False) -> float:
    """ZD of a block.

    weights : give its matrices, one in memory at a time; read twice
    two_sided : count |z| above the threshold
    """
    count, total, squares = 0, 0.0, 0.0
    for read in weights:
        values = read().double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    mean = total / max(1, count)
    deviation = max(0.0, squares / max(1, count) - mean * mean) ** 0.5
    if deviation == 0:
        return 0.0
    above = 0
    for read in weights:
        z = (read().double() - mean) / deviation
        # weights exactly one deviation away, as those of two values, are not above it but for rounding
        above += int(((z.abs() if two_sided else z) > threshold * (1 + 1e-9)).sum())
    return above / max(1, count)
