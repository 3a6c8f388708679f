"""What activations go through on the way to an operand, in PyTorch and in kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featherweight.model.products.triton import activations
from featherweight.model.products.triton.operand import Step


def stepped(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """x after the steps on the way to an operand, in its dtype."""
    for step in steps:
        if step.kind == "permute":
            x = x.index_select(1, tensor_of(step))
        elif step.kind == "scale":
            x = (x * tensor_of(step)).to(x.dtype)
        elif step.kind == "hadamard":
            x = activations.hadamard(x, tensor_of(step), step.block)
        else:
            x = _round(x, step.block, step.bits)
    return x


def tensor_of(step: Step) -> Tensor:
    assert step.tensor is not None
    return step.tensor


def _round(x: Tensor, group_size: int, bits: int) -> Tensor:
    """The rounding of `quantized-input` (docs/format.md)."""
    top = (1 << (bits - 1)) - 1
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group_size)).view(len(x), -1, group_size)
    step = (padded.abs().amax(-1, keepdim=True) / top).clamp(1e-5, 1e4).half().float()
    rounded = (padded / step).round().clamp(-top - 1, top) * step
    return rounded.view(len(x), -1)[:, : x.shape[1]].to(x.dtype)
