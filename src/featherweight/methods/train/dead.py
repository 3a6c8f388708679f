"""The bias of Tequila (arXiv 2509.23809): strength times the sum of a row's dead weights, those with the digit 0.

C_i = strength sum of w_ij over j with digit 0, and its exact gradient: strength g_i for each of these, where g_i is the
sum of the output's gradients over all tokens. Which weights are dead counts as fixed. Sums are of float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeadBias(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, digits: Tensor, strength: float) -> Tensor:
        dead = digits == 0
        ctx.save_for_backward(dead)
        ctx.strength = strength
        values = latent if latent.dtype == torch.float64 else latent.float()
        return strength * (values * dead).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dead,) = ctx.saved_tensors
        return (ctx.strength * gradients[0]).unsqueeze(1) * dead, None, None


def dead_bias(latent: Tensor, digits: Tensor, strength: float) -> Tensor:
    """[out], differentiable in the latents [out, in]."""
    bias: Tensor = DeadBias.apply(latent, digits, strength)  # type: ignore[no-untyped-call]
    return bias
