"""A code of a matrix whose input was rotated by a randomised orthogonal block transform T: inner = W T^-1.

T x = blockdiag(H, ..., H) (s * x), s signs that follow from a seed and therefore cost nothing, H orthogonal of order
`block`: a Hadamard matrix over the root of its order for 2^p (Sylvester, entries (-1)^popcount(i & j)) and for 12, 20
and 28 times 2^p, and for every other order of odd part up to 63 the Kronecker product of a dense orthogonal matrix and
a Sylvester matrix (see `featherweight.storage.codes.orthogonal`). So a block may be as wide as most layers are.

Sign j is that of the j-th output (from 0) of the generator SplitMix64 (Steele, Lea, Flood 2014) started with the seed:
-1 where the top bit is set. `decode` adds, subtracts and multiplies by fixed float32 numbers in a fixed order, and
every result is rounded before it is used, so it gives the same bits on every machine with arithmetic of IEEE 754.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.codes.base import Code, TensorLayout, describe_part, matrix_shape, whole_number
from featherweight.storage.codes.nested import Wrapper, bare_spec, open_further, part_from, part_layout, part_tensors
from featherweight.storage.codes.orthogonal import dense_factor, divides, kernel_order, refusal

SEEDS = 1 << 53
"""Seeds are below this: integers that every JSON reader keeps exactly."""

CACHED = 1 << 17  # elements that are transformed together: with their copy they fit a second-level cache
DENSE = 512  # largest order up to which a product with the whole matrix is the faster way on CPUs


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as int64."""
    return value - (1 << 64) if value >> 63 else value


def splitmix64(seed: int, count: int) -> Tensor:
    """The first outputs of SplitMix64 as int64 [count] (the bits of the unsigned numbers)."""

    def shifted(z: Tensor, by: int) -> Tensor:  # a logical shift
        return z ^ (z >> by & (1 << (64 - by)) - 1)

    z = torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    z = shifted(z, 30) * _signed(0xBF58476D1CE4E5B9)
    z = shifted(z, 27) * _signed(0x94D049BB133111EB)
    return shifted(z, 31)


@functools.lru_cache(maxsize=64)
def _signs(seed: int, columns: int) -> Tensor:
    """On the CPU whatever the default device: a cached tensor made while a model is built on "meta" would stay so."""
    return torch.where(splitmix64(seed, columns) < 0, -1, 1).to(torch.int8)


def random_signs(seed: int, columns: int) -> Tensor:
    """The signs of a seed: int8 [columns], -1 or 1."""
    return _signs(seed, columns).clone()


def hadamard_transform(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    """H v (or H^T v) for each run v of `block` neighbours along the last dimension of a floating-point tensor.

    Differentiable. ValueError if `block` does not divide the dimension or no matrix of this order is known.
    """
    if not divides(block, x.shape[-1]):
        raise ValueError(refusal(block, x.shape[-1]))
    value: Tensor = _Transform.apply(x, block, transposed)  # type: ignore[no-untyped-call]
    return value


class _Transform(torch.autograd.Function):
    """The gradient of an orthogonal transform is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, transposed: bool) -> Tensor:
        ctx.settings = block, not transposed
        return _transformed(x, block, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Transform.apply(gradients[0], *ctx.settings), None, None  # type: ignore[no-untyped-call]


def _transformed(x: Tensor, block: int, transposed: bool) -> Tensor:
    runs = x.reshape(-1, block)
    result = torch.empty_like(runs, memory_format=torch.contiguous_format)
    step = max(16, CACHED // block) if x.device.type == "cpu" else max(1, len(runs))
    for first in range(0, len(runs), step):
        # one column a run: the butterflies then work on whole contiguous rows
        part = runs[first : first + step].t().clone(memory_format=torch.contiguous_format)
        torch.mul(_butterflies(part, block, transposed).t(), 1 / math.sqrt(block), out=result[first : first + step])
    return result.view(x.shape)


def _butterflies(runs: Tensor, block: int, transposed: bool) -> Tensor:
    """Columns [block, n] times H, not yet divided by the root of `block`; overwrites `runs`."""
    kernel = dense_factor(kernel_order(block) or 1)
    spare, half = torch.empty_like(runs), 1
    while half * len(kernel) < block:
        pairs, sums = (t.view(block // (2 * half), 2, half, runs.shape[1]) for t in (runs, spare))
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        runs, spare, half = spare, runs, 2 * half
    if len(kernel) == 1:
        return runs
    factor = (kernel.T if transposed else kernel).to(runs.device, runs.dtype)
    parts = runs.view(len(kernel), -1)
    total = torch.zeros_like(parts)
    for j in range(len(kernel)):  # in this order, the product rounded before it is added: the same bits everywhere
        total += factor[:, j : j + 1] * parts[j]
    return total.view(block, -1)


@functools.lru_cache(maxsize=8)
def _dense(block: int) -> Tensor:
    """H itself, float32 [block, block]: a product with it is faster than butterflies up to `DENSE`."""
    return hadamard_transform(torch.eye(block, device="cpu"), block, transposed=True)


def rotate(x: Tensor, block: int, seed: int) -> Tensor:
    """T x for inputs [..., in]; for a matrix [out, in], its rows being such vectors, W T^-1."""
    return hadamard_transform(x * _signs(seed, x.shape[-1]).to(x.device, x.dtype), block)


def rotate_back(x: Tensor, block: int, seed: int) -> Tensor:
    """T^-1 x for [..., in]; for a matrix, W T."""
    return hadamard_transform(x, block, transposed=True) * _signs(seed, x.shape[-1]).to(x.device, x.dtype)


@register("code", "hadamard")
@dataclass(frozen=True)
class Hadamard(Wrapper):
    """See the module. `block` divides the number of columns; 0 <= `seed` < 2^53."""

    inner: Code
    block: int
    seed: int

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "block": self.block,
            "seed": self.seed,
            "inner": bare_spec(self.inner),
        }

    def tensors(self) -> dict[str, Tensor]:
        return part_tensors(self.inner, "inner_")

    def decode(self) -> Tensor:
        return rotate_back(self.inner.decode(), self.block, self.seed)

    def decode_rows(self, first: int, last: int) -> Tensor:
        return rotate_back(self.inner.decode_rows(first, last), self.block, self.seed)

    def decode_fast(self) -> Tensor:
        if self.block > DENSE:
            return rotate_back(self.inner.decode_fast(), self.block, self.seed)
        inner = self.inner.decode_fast()
        matrix = _dense(self.block).to(inner.device, inner.dtype)
        turned = (inner.reshape(-1, self.block) @ matrix).view(inner.shape)
        return turned * _signs(self.seed, inner.shape[1]).to(inner.device, inner.dtype)

    def opened(self, matrix: Tensor) -> tuple[Code, Tensor, str]:
        return open_further(self.inner, rotate(matrix, self.block, self.seed), "rotated")

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        _, columns = matrix_shape(spec)
        block = whole_number(spec, "block", 1, columns)
        whole_number(spec, "seed", 0, SEEDS - 1)
        if not divides(block, columns):
            raise ValueError(refusal(block, columns))
        return part_layout(spec, spec.get("inner"), "inner_")

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Hadamard:
        return cls(part_from(spec, spec.get("inner"), "inner_", tensors), spec["block"], spec["seed"])

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        return f"hadamard {spec['block']} of {describe_part(spec, spec['inner'])}"
