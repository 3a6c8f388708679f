"""A randomised rotation of blocks of a layer's input: Hadamard matrices, or what is nearest to them for other widths.

QuaRot (arXiv 2404.00456) and QuIP# (arXiv 2402.04396) rotate to spread outliers of weights and activations over all
columns; RSQ (arXiv 2503.01820) and PVQ (arXiv 2410.16926) start from it. Here the rotation belongs to one layer and is
kept in its code, so any architecture will do and nothing is folded into neighbours. Blocks of 128 columns (not the
whole width, as in QuaRot) keep an online transform cheap; `block: whole` takes the largest order that divides, which is
the width where its odd part is 63 or less. QuaRot and QuIP# know Hadamard matrices alone, and fall back elsewhere.
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
from featherweight.storage.codes.hadamard import SEEDS, Hadamard, rotate, rotate_back
from featherweight.storage.codes.orthogonal import divides, largest_order, refusal


def block_for(columns: int, block: int | Literal["whole"]) -> int:
    """The order of the rotation for a width.

    `block` itself where it divides the width; a power of two is also an upper bound: where it does not divide, the
    largest one up to it that does. "whole": the largest order of all that divides. ValueError, with the nearest order,
    where another `block` does not divide or there is no such order.
    """
    if block == "whole":
        return largest_order(columns)
    if divides(block, columns):
        return block
    if block & (block - 1):
        raise ValueError(refusal(block, columns))
    return min(columns & -columns, block)


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
    """Rotate blocks of input columns by random signs and a Hadamard matrix, or, for orders that have none here, an
    orthogonal one nearly as even; signs follow from a seed (see the module).

    A width that no power of two but 1 divides is left as it is, and its code is not wrapped, unless `block` names an
    order that divides it, or is whole.
    """

    portable: ClassVar[bool] = True
    block: Annotated[int, Field(ge=1)] | Literal["whole"] = Field(
        128,
        description="columns rotated together, odd part up to 63; where a power of two does not divide, the largest "
        "that does; whole: the width, or its largest divisor of such an odd part",
    )
    roles: tuple[str, ...] = Field((), description="only layers of these roles, such as o_proj; none named: all")

    def layer_refusal(self, columns: int, role: str) -> str | None:
        try:
            self._block(columns, role)
        except ValueError as error:
            return str(error)
        return None

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        block = self._block(weight.shape[1], role)
        return Identity() if block == 1 else Rotation(block, seed % SEEDS)

    def _block(self, columns: int, role: str) -> int:
        return block_for(columns, self.block) if not self.roles or role in self.roles else 1
