"""Small low-bit layers for tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.quantize.choosing import choice_on
from featherweight.methods.train.base import Forward
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import prepare


def forward_of(kind: str, **settings: Any) -> Forward:
    found: Forward = choice_on("forward", {"kind": kind, **settings})
    return found


def layer_of(weight: Tensor, forward: dict[str, Any], bias: bool = False, **axes: Any) -> LowBitLinear:
    """A low-bit layer with these latents, in their type."""
    rows, columns = weight.shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=weight.dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    prepare(model, {"forward": forward, **axes})
    assert isinstance(model[0], LowBitLinear)
    return model[0]


def golden(count: int) -> Tensor:
    """The row of the golden values: float64 [1, count]."""
    j = torch.arange(1, count + 1, dtype=torch.float64)
    return ((1.7 * j + 0.3 * j * j).sin() + 0.5 * (2.9 * j).cos()).unsqueeze(0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """In [-1, 1], float64."""
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def relative_error(weight: Tensor, value: Tensor) -> float:
    return math.sqrt(float((weight - value).square().sum() / weight.square().sum()))
