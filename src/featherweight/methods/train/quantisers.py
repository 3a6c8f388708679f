"""Ready-made quantisers of weights in training: uniform, FP8, ternary; to the nearest or at random."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from featherweight.errors import FeatherError

WIDE = (torch.float32, torch.float64)
"""Types in which weights are rounded as they are; others in float32."""


class Quantiser(Protocol):
    """What a weight may become: weight -> the nearest or a random neighbour, of the same shape, dtype and device."""

    def __call__(self, weight: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Codes:
    """Base of the ready-made quantisers: `decode(*encode(weight))` of matrices (or tensors seen as such).

    stochastic : round up with the probability of the place between two levels, so that the mean is the weight; else to
        the nearest
    """

    stochastic: bool = False

    def __call__(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.decode(*self.encode(weight, generator)).to(weight.dtype)

    def encode(self, weight: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Codes of the weight's shape, and float32 scales, 0 to 2 dimensions fewer in number."""
        raise NotImplementedError

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values, float32, or float64 if the scales are."""
        raise NotImplementedError

    def spacing(self, weight: Tensor) -> Tensor:
        """Distance of two levels where they are furthest apart, in a shape that broadcasts to the weight's."""
        raise NotImplementedError

    def nbytes(self, shape: torch.Size) -> int:
        """Bytes of codes and scales of a weight of this shape."""
        raise NotImplementedError

    def rounded(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """Whole numbers near the values."""
        if not self.stochastic:
            return values.round()
        return (
            values + torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
        ).floor()


@dataclass(frozen=True)
class Uniform(Codes):
    """Whole numbers of `bits` bits, without the lowest, times a scale for each group of neighbouring columns.

    bits : 2 to 8
    group_size : columns that share a scale; None for whole rows. It must divide the number of columns
    scales : fixed ones, as `fixed` makes them; None to take the largest magnitude of each group anew at every step
    """

    bits: int = 4
    group_size: int | None = None
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FeatherError(f"a uniform quantiser has 2 to 8 bits, and not {self.bits}")

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    def fixed(self, weight: Tensor) -> Uniform:
        """This quantiser with the scales that `weight` has now, kept from then on."""
        return replace(self, scales=self._scales(weight))

    def _scales(self, weight: Tensor) -> Tensor:
        if self.scales is not None:
            return self.scales
        largest = self._groups(weight).abs().amax(-1)
        return torch.where(largest > 0, largest / self.top, 1.0)

    def _groups(self, weight: Tensor) -> Tensor:
        """[rows, groups, columns of a group], float."""
        size = self.group_size or math.prod(weight.shape[1:])
        columns = math.prod(weight.shape[1:])
        if columns % size:
            raise FeatherError(f"groups of {size} columns do not fill rows of {columns}: take a size that divides it")
        return floating(weight).reshape(weight.shape[0], columns // size, size)

    def encode(self, weight: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        scales = self._scales(weight)  # [rows, groups]
        codes = self.rounded(self._groups(weight) / scales.unsqueeze(-1), generator).clamp_(-self.top, self.top)
        return codes.to(torch.int8).reshape(weight.shape), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (codes.reshape(*scales.shape, -1) * scales.unsqueeze(-1)).reshape(codes.shape)

    def spacing(self, weight: Tensor) -> Tensor:
        groups = self._groups(weight)
        return self._scales(weight).unsqueeze(-1).expand_as(groups).reshape(weight.shape)

    def nbytes(self, shape: torch.Size) -> int:
        columns = math.prod(shape[1:])
        return (math.prod(shape) * self.bits + 7) // 8 + 4 * shape[0] * (columns // (self.group_size or columns))


@dataclass(frozen=True)
class Fp8(Codes):
    """FP8 E4M3 with one scale a tensor, which takes the largest magnitude to 448.

    exact_in_bfloat16 : scales are powers of two, the next above, so that a parameter in bfloat16 holds every value
    """

    exact_in_bfloat16: bool = False

    def encode(self, weight: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        scale = self._scale(weight)
        values = floating(weight) / scale
        if self.stochastic:
            _, exponent = torch.frexp(values)  # the value is in [0.5, 1) * 2**exponent
            step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=-5) - 4)  # 3 bits behind the first
            values = self.rounded(values / step, generator) * step
        return values.clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.to(scales.dtype) * scales

    def _scale(self, weight: Tensor) -> Tensor:
        largest = floating(weight).abs().amax()
        scale = torch.where(largest > 0, largest / 448, 1.0)
        return torch.exp2(scale.log2().ceil()) if self.exact_in_bfloat16 else scale

    def spacing(self, weight: Tensor) -> Tensor:
        return self._scale(weight) * 32  # between 256 and 448

    def nbytes(self, shape: torch.Size) -> int:
        return math.prod(shape) + 4


@dataclass(frozen=True)
class Ternary(Codes):
    """-1, 0 or 1 times the mean magnitude of a tensor. The paper does not cover it: errors are far larger than in FP8.

    scale : a fixed one, as `fixed` makes it, which is more stable; None to take the mean anew at every step
    """

    scale: Tensor | None = None

    def fixed(self, weight: Tensor) -> Ternary:
        """This quantiser with the scale that `weight` has now, kept from then on."""
        return replace(self, scale=self.spacing(weight))

    def encode(self, weight: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        scale = self.spacing(weight)
        return self.rounded(floating(weight) / scale, generator).clamp_(-1, 1).to(torch.int8), scale

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales

    def spacing(self, weight: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale
        mean = floating(weight).abs().mean()
        return torch.where(mean > 0, mean, 1.0)

    def nbytes(self, shape: torch.Size) -> int:
        return (math.prod(shape) + 4) // 5 + 4  # five of them a byte


def floating(weight: Tensor) -> Tensor:
    """In float32, or float64 if that is what it is in."""
    return weight.detach() if weight.dtype in WIDE else weight.detach().float()
