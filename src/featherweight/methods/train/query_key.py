"""QKR of OFQ (arXiv 2302.02210): what is rounded is the product of a head's query and key matrix, and not the two.

The logits of head h are x A_h y^T / sqrt(d) with A_h = W_q,h^T W_k,h [C, C], x what queries and y what keys are made
of. All A_h one below the other, [heads C, C], are rounded as a layer's matrix is, with a scale a row; W_q and W_k are
the latents, and biases of queries and keys are dropped. Inputs are rounded as those of a layer are, and so is
A y^T + bias. Nothing may come between projection and product: rotary positions would, and norms.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.methods.train.inputs import RoundedInput
from featherweight.methods.train.layer import Choices, LowBit, widen


class Latent(nn.Linear):
    """A projection whose matrix is a latent of a product: what it gets it passes on."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in], as it came."""
        return input


class QueryKeyProduct(LowBit):
    """x A y^T for all heads (see the module).

    Attributes
    ----------
    bias : [heads C], added to A y^T before it is rounded
    inputs, products : round x and y, and A y^T + bias
    """

    unstorable: ClassVar[str] = (
        "the product of queries and keys (attention.product) has no place in a folder: leave it out to store the model"
    )

    def __init__(self, query: nn.Linear, key: nn.Linear, head_size: int, choices: Choices, name: str) -> None:
        """Take the place of two projections, which become `Latent`s."""
        super().__init__()
        for layer in (query, key):
            widen(layer.weight)
            layer.register_parameter("bias", None)
            layer.__class__ = Latent
        self.latents, self.head_size = (query, key), head_size  # in a tuple: parameters stay those of the projections
        device = query.weight.device
        rows = query.out_features // head_size * key.in_features
        self.bias = nn.Parameter(torch.zeros(rows, dtype=query.weight.dtype, device=device))
        self.inputs = RoundedInput(choices.activation, f"{name}.inputs", device)
        self.products = RoundedInput(choices.activation, f"{name}.products", device)
        self.begin(choices, name)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A, all heads one below the other: [heads C, C], differentiable."""
        query, key = (layer.weight.view(-1, self.head_size, layer.in_features) for layer in self.latents)
        key = key.repeat_interleave(len(query) // len(key), 0)
        return (query.transpose(1, 2) @ key).flatten(0, 1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of x [B, N, C] and y [B, M, C]: [B, heads, N, M], not yet scaled."""
        found = self.rounded()
        x, y = self.inputs(queries), self.inputs(keys)
        constant = self.choices.backward.constant(self, found)
        bias = self.bias if constant is None else self.bias + constant
        products = self.products(F.linear(y, self.matrix(found).to(y.dtype), bias.to(y.dtype)))
        by_head = products.view(*products.shape[:-1], -1, x.shape[-1])  # [B, M, heads, C]
        return torch.einsum("bnc,bmhc->bhnm", x, by_head)

    def extra_repr(self) -> str:
        return self.kinds
