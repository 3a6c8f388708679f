"""Quantised inputs of a layer: symmetric integers with a scale per token and group, found while the model runs.

FlexQ (arXiv 2508.04405): step = clamp(absmax / (2^(b-1) - 1), 1e-5, 1e4), q = clamp(round(x / step), -2^(b-1),
2^(b-1) - 1), halves to even; 6 bits, but 8 where a layer's input proved sensitive (the MLP's second layer). Steps are
rounded to float16, as weight scales are, so that quantising twice changes nothing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALLEST_STEP, LARGEST_STEP = 1e-5, 1e4

SENSITIVE = ("down_proj", "fc2", "w2", "dense_4h_to_h")
"""Names of an MLP's second layer: `down_proj` and OPT's `fc2` as published, and what other families call it."""


def input_bits(role: str, bits: int = 6, wide_bits: int = 8, wide: Sequence[str] = SENSITIVE) -> int:
    """Bits of the input of a layer with this last name component: `wide_bits` where a pattern of `wide` matches."""
    return wide_bits if any(fnmatch.fnmatchcase(role, pattern) for pattern in wide) else bits


def quantize_inputs(inputs: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int16 [..., in] and steps float32 [..., groups] (float16 values) of inputs [..., in] in any float dtype."""
    groups = _grouped(inputs.float(), group_size)
    top, steps = _steps(groups, bits)
    codes = (groups / steps).round_().clamp_(-top - 1, top).to(torch.int16)
    return codes.flatten(-2)[..., : inputs.shape[-1]], steps.squeeze(-1)


def dequantize_inputs(codes: Tensor, steps: Tensor, group_size: int) -> Tensor:
    """The values codes [..., in] and steps [..., groups] stand for: float32 [..., in]."""
    values = _grouped(codes.float(), group_size) * steps.unsqueeze(-1)
    return values.flatten(-2)[..., : codes.shape[-1]]


def quantized_inputs(inputs: Tensor, bits: int, group_size: int) -> Tensor:
    """Inputs rounded to what a kernel with integer inputs would compute with: float32 [..., in].

    Differentiable by the straight-through rule.
    """
    rounded: Tensor = _RoundedInputs.apply(inputs, bits, group_size)  # type: ignore[no-untyped-call]
    return rounded


class _RoundedInputs(torch.autograd.Function):
    """`dequantize_inputs` of `quantize_inputs`, in fewer passes over the inputs: whole numbers stay floats."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bits: int, group_size: int) -> Tensor:
        ctx.dtype = inputs.dtype
        groups = _grouped(inputs.float(), group_size)
        top, steps = _steps(groups, bits)
        values = (groups / steps).round_().clamp_(-top - 1, top).mul_(steps)
        return values.flatten(-2)[..., : inputs.shape[-1]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.dtype), None, None


def _steps(groups: Tensor, bits: int) -> tuple[int, Tensor]:
    """The largest whole number, and steps [..., groups, 1] of inputs [..., groups, size]."""
    top = (1 << (bits - 1)) - 1
    largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1, keepdim=True)
    return top, (largest / top).clamp(SMALLEST_STEP, LARGEST_STEP).half().float()


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """[..., groups, size], the last group padded with zeros."""
    size = min(group_size, values.shape[-1])
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(*padded.shape[:-1], -1, size)


def input_range(inputs: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Least and greatest input, containing 0: of each token [..., 1], or of the whole tensor [] for a static range."""
    if per_token:
        return inputs.amin(-1, keepdim=True).clamp(max=0), inputs.amax(-1, keepdim=True).clamp(min=0)
    return inputs.min().clamp(max=0), inputs.max().clamp(min=0)


def omse_input_range(inputs: Tensor, bits: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The static range, both ends shrunk by 1, 0.99, ... 0.11, with the least squared error on `inputs`.

    World-model quantisation (arXiv 2602.02110).
    """
    errors = []
    for i in range(90):
        factor = 1 - 0.01 * i
        errors.append((affine_inputs(inputs, bits, factor * low, factor * high) - inputs).double().square().mean())
    factor = 1 - 0.01 * int(torch.stack(errors).argmin())
    return factor * low, factor * high


def affine_inputs(inputs: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Inputs rounded to 2^bits evenly spaced values from about `low` to `high`, 0 among them: float32.

    step = (high - low) / (2^bits - 1), zero = clamp(round(-low / step), 0, 2^bits - 1), as in arXiv 2602.02110.
    """
    top = (1 << bits) - 1
    step = ((high - low).float() / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low.float() / step).round().clamp(0, top)
    return (((inputs.float() / step).round() + zero).clamp(0, top) - zero) * step
