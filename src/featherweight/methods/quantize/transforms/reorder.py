"""Reordering of input columns, so that columns which share a group fit together. The order is stored with the code.

`activation`: falling mean square of the input channel, the order that GPTQ's act-order visits columns in
(arXiv 2210.17323, reference code); groups are then formed of channels of like importance.

`similarity`: the light form of PT2-LLM's structural similarity reordering (arXiv 2510.03267, eq. 16): the columns most
similar (cosine) to the mean of those that remain make the next group. The paper does this inside its sweep, on columns
that have taken up the errors of earlier groups: that is `order: similarity` of the rounding `hessian`. Here it is done
on the weights as they are, before any rounding, which is cheaper and serves roundings that have no sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.methods.calibrate.statistics import Statistics, carried
from featherweight.methods.quantize.base import LayerTransform, Transform
from featherweight.methods.quantize.similarity import most_similar, with_first
from featherweight.methods.quantize.transforms.identity import Identity
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.codes.nested import index_dtype
from featherweight.storage.codes.permuted import Permuted, inverse_order


def activation_order(gram: Tensor) -> Tensor:
    """Columns by falling diagonal of the gram matrix, equal ones in their order: int64 [in]."""
    return gram.diagonal().argsort(descending=True, stable=True)


def similarity_order(weight: Tensor, group_size: int) -> Tensor:
    """The columns of a weight [out, in], group by group (see the module), rising within each: int64 [in]."""
    columns = weight.detach().double()
    remaining = torch.arange(weight.shape[1], device=weight.device)
    order = []
    while remaining.numel():
        best = most_similar(columns[:, remaining], group_size)
        places, count = with_first(best, remaining.numel()), best.numel()
        order.append(remaining[places[:count]])
        remaining = remaining[places[count:]]
    return torch.cat(order)


@dataclass(frozen=True, eq=False)
class Reordering:
    """T x = x[order]: a `LayerTransform`. `order` int64 [in], in main memory."""

    order: Tensor
    portable: ClassVar[bool] = True

    @property
    def key(self) -> tuple[str, bytes]:
        return "reorder", self.order.numpy().tobytes()

    def apply(self, weight: Tensor) -> Tensor:
        return weight[:, self.order.to(weight.device)]

    def invert(self, weight: Tensor) -> Tensor:
        return weight[:, inverse_order(self.order).to(weight.device)]

    def inputs(self, inputs: Tensor) -> Tensor:
        return inputs[..., self.order.to(inputs.device)]

    def statistics(self, statistics: Statistics) -> dict[str, Tensor]:
        return carried(statistics, self.inputs, self.apply, mean_abs=self.inputs, fisher=self.apply)

    def wrap(self, code: Code) -> Code:
        return Permuted.encode(code, self.order)


@register("transform", "reorder")
class ReorderTransform(Transform):
    """Put input columns into another order, by activation or by similarity (see the module).

    An order that changes nothing, and `activation` without statistics, leave the code as it is.
    """

    portable: ClassVar[bool] = True
    by: Literal["activation", "similarity"] = Field("activation", description="what columns of a group have in common")
    group_size: int = Field(128, ge=1, description="columns that similarity puts together; those of the grid's groups")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.by == "activation" else ()

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        return shape[1] * index_dtype(shape[1]).itemsize

    def for_layer(self, weight: Tensor, statistics: Statistics, seed: int, role: str = "") -> LayerTransform:
        if self.by == "similarity":
            order = similarity_order(weight, self.group_size)
        elif "gram" in statistics:
            order = activation_order(statistics["gram"])
        else:
            return Identity()
        unchanged = torch.equal(order, torch.arange(weight.shape[1], device=order.device))
        return Identity() if unchanged else Reordering(order.cpu())
