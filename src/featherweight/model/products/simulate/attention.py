"""TeLLMe's attention (arXiv 2510.15926): one fused pass with an online softmax, and two passes for a single query.

Prefill takes queries in blocks of 8 and streams the keys and values once for each block, only as far as the block can
see, so that a sequence of L tokens reads L (L + 8) / 16 rows (L rounded up to blocks) instead of L (L + 1) / 2. The
authors' sources store tokens in reversed order; here the order is the ordinary one, which gives the same results.
Running maxima, sums and outputs have the dtype of the input: fp16 on the device, where sums degrade beyond about 1024
tokens, float32 or float64 here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERY_BLOCK = 8
CONTEXT = 1024


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, block: int = QUERY_BLOCK) -> tuple[Tensor, int]:
    """Causal attention [heads, length, head_dim] of each head, and how many rows of keys (and as many of values) a head
    read.

    All blocks that read a row take it in the same step here; the arithmetic of each query is that of its own stream.
    """
    heads, length, width = query.shape
    scaled = query / math.sqrt(width)
    largest = query.new_full((heads, length), -math.inf)
    total, out = query.new_zeros(heads, length), torch.zeros_like(query)
    rows_read = 0
    for position in range(length):
        first = position // block * block  # the first query whose block sees this row
        rows_read += -(-(length - first) // block)
        score = scaled[:, first:] @ key[:, position, :, None]
        score = score.squeeze(-1)
        score[:, : position - first] = -math.inf  # the corner above the diagonal: loaded, but without weight
        before = largest[:, first:]
        after = torch.maximum(before, score)
        kept, share = torch.exp(before - after), torch.exp(score - after)
        largest[:, first:] = after
        total[:, first:] = total[:, first:] * kept + share
        out[:, first:] = out[:, first:] * kept.unsqueeze(-1) + share.unsqueeze(-1) * value[:, position : position + 1]
    return out / total.unsqueeze(-1), rows_read


def decode_attention(query: Tensor, key: Tensor, value: Tensor, context: int = CONTEXT) -> Tensor:
    """Attention of one query [heads, head_dim] to all keys and values [heads, length, head_dim], in two passes.

    The first keeps the scores in a queue of `context` places with their running maximum and sum, the second weighs the
    values. ValueError where the queue is too short.
    """
    heads, length, width = key.shape
    if length > context:
        raise ValueError(f"{length} tokens do not fit a queue of {context} scores")
    scaled = query / math.sqrt(width)
    largest, total = query.new_full((heads,), -math.inf), query.new_zeros(heads)
    queue = []
    for position in range(length):
        score = (scaled * key[:, position]).sum(-1)
        after = torch.maximum(largest, score)
        total = total * torch.exp(largest - after) + torch.exp(score - after)
        largest = after
        queue.append(score)
    out = torch.zeros_like(query)
    for position, score in enumerate(queue):
        out += (torch.exp(score - largest) / total).unsqueeze(-1) * value[:, position]
    return out
