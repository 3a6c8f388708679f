"""A randomised block-Hadamard rotation of a layer's input.

QuaRot (arXiv 2404.00456) and QuIP# (arXiv 2402.04396) rotate to spread outliers of weights and activations over all
columns; RSQ (arXiv 2503.01820) and PVQ (arXiv 2410.16926) start from it. Here the rotation belongs to one layer and is
kept in its code, so any architecture will do and nothing is folded into neighbours. Blocks of 128 columns (not the
whole width, as in QuaRot) keep an online transform cheap; `block: whole` takes the largest order that divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, carried
from featherweight.methods.quantize.base import LayerTransform, Transform
from featherweight.methods.quantize.transforms.identity import Identity
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.hadamard import SEEDS, Hadamard, kernel_order, rotate, rotate_back


def block_for(columns: int, block: int | Literal["whole"]) -> int:
    """The order of the Hadamard matrices for a width.

    `block` itself where it divides the width and there is such a matrix, else the largest power of two up to `block`
    that divides; "whole": the largest order of all (2^p, or 12, 20 or 28 times 2^p) that divides.
    """
    if block == "whole":
        return max(n for n in range(1, columns + 1) if columns % n == 0 and kernel_order(n) is not None)
    if columns % block == 0 and kernel_order(block) is not None:
        return block
    return min(columns & -columns, 1 << (block.bit_length() - 1))


@dataclass(frozen=True)
class Rotation:
    """T x = blockdiag(H, ..., H)(s x): a `LayerTransform`, orthogonal. See `featherweight.storage.codes.hadamard`."""

    block: int
    seed: int
    portable: ClassVar[bool] = True

    @property
    def key(self) -> tuple[Any, ...]:
        return "hadamard", self.block, self.seed

    def apply(self, weight: Tensor) -> Tensor:
        return rotate(weight, self.block, self.seed)

    def invert(self, weight: Tensor) -> Tensor:
        return rotate_back(weight, self.block, self.seed)

    def inputs(self, inputs: Tensor) -> Tensor:
        return rotate(inputs, self.block, self.seed)

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        """All but `fisher`, whose rotation would need the products of gradients of different weights."""
        return carried(statistics, self.inputs, self.apply)

    def wrap(self, code: Code) -> Code:
        return Hadamard(code, self.block, self.seed)


@register("transform", "hadamard")
class HadamardTransform(Transform):
    """Rotate blocks of input columns by random signs and a Hadamard matrix; signs follow from a seed (see the module).

    A width that no power of two but 1 divides is left as it is, and its code is not wrapped.
    """

    portable: ClassVar[bool] = True
    block: Annotated[int, Field(ge=1)] | Literal["whole"] = Field(
        128,
        description="columns rotated together; where it does not divide, the largest power of two that does; or whole",
    )
    roles: tuple[str, ...] = Field((), description="only layers of these roles, such as o_proj; none named: all")

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        block = block_for(weight.shape[1], self.block) if not self.roles or role in self.roles else 1
        return Identity() if block == 1 else Rotation(block, seed % SEEDS)
