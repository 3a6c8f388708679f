"""Which weights share a scale, and scales as they are stored.

Codes hold a scale for each row and group of columns. A scale of the whole matrix, or of a shard of it, is stored in
every row: 16 bits a row (a thousandth of a bit a weight in a row of 16384), which are counted.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.train.base import Forward
from featherweight.storage.codes.base import groups_of

SMALLEST, LARGEST = 1e-5, 6e4
"""Of scales: BitNet's floor, and just below float16's largest."""


class Scoped(Forward):
    """A forward code whose scale is found from the weights that share it."""

    scope: Literal["tensor", "shard", "row", "group"] = Field(
        "row", description="what shares a scale: the whole matrix, a shard of it, a row, or a group of columns"
    )
    group_size: int = Field(128, ge=1, description="with the scope group: input columns that share a scale")
    shards: int = Field(1, ge=1, description="with the scope shard: how many parts the matrix has")
    shard_along: Literal["output", "input"] = Field("output", description="whether shards are of rows or of columns")
    scale_dtype: Literal["float16", "float32"] = Field("float16", description="type in which scales are stored")

    def columns_of(self, columns: int) -> int:
        """Columns of a row with one scale."""
        if self.scope == "group":
            return min(self.group_size, columns)
        return columns // self.shards if self.scope == "shard" and self.shard_along == "input" else columns

    def check_shape(self, shape: tuple[int, int], name: str) -> None:
        side = 0 if self.shard_along == "output" else 1
        if self.scope == "shard" and shape[side] % self.shards:
            raise RecipeError(
                f"{name} has {shape[side]} {'rows' if side == 0 else 'columns'}, which {self.shards} shards do not "
                "divide: choose another number for forward.shards"
            )

    def blocks(self, weight: Tensor) -> Tensor:
        """[out, in] to [out, groups, size], zeros behind the last column; reduced in float32 at least."""
        values = weight.detach()
        values = values if values.dtype == torch.float64 else values.float()
        rows, columns = values.shape
        size = self.columns_of(columns)
        if columns % size:
            values = torch.nn.functional.pad(values, (0, -columns % size))
        return values.reshape(rows, -1, size)

    def flat(self, blocks: Tensor, columns: int) -> Tensor:
        """The inverse of `blocks`: [out, in]."""
        return blocks.reshape(len(blocks), -1)[:, :columns]

    def total(self, blocks: Tensor) -> Tensor:
        """Sums over what shares a scale: [out, groups, 1], or with sides of 1 where these are all alike."""
        if self.scope == "tensor":
            return blocks.sum().view(1, 1, 1)
        if self.scope == "shard" and self.shard_along == "output":
            rows, _, size = blocks.shape
            sums = blocks.reshape(self.shards, -1).sum(1)
            return sums.repeat_interleave(rows // self.shards).view(rows, 1, 1)
        if self.scope == "shard":
            return blocks.sum((0, 2)).view(1, -1, 1)
        return blocks.sum(2, keepdim=True)

    def counts(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Weights that share a scale, in the shape of `total`."""
        rows, columns = shape
        if self.scope == "group" and columns % self.columns_of(columns):
            sizes = torch.full((groups_of(columns, self.group_size),), float(self.group_size), device=like.device)
            sizes[-1] = columns % self.group_size
            return sizes.to(like.dtype).view(1, -1, 1)
        size = self.columns_of(columns)
        by_scope = {"tensor": rows * columns, "row": columns, "group": size, "shard": rows * columns // self.shards}
        return torch.full((1, 1, 1), float(by_scope[self.scope]), dtype=like.dtype, device=like.device)

    def mean_abs(self, weight: Tensor, blocks: Tensor) -> Tensor:
        """mean|w| over what shares a scale, in the shape of `total`."""
        return self.total(blocks.abs()) / self.counts((weight.shape[0], weight.shape[1]), blocks)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales rounded to what is stored, in the type they came in."""
        kept = torch.float16 if self.scale_dtype == "float16" else torch.float32
        return scales.clamp(SMALLEST, LARGEST).to(kept).to(scales.dtype)

    def spread(self, scales: Tensor, blocks: Tensor) -> Tensor:
        """Scales in the shape of `total` as [out, groups]."""
        return scales.expand(blocks.shape[0], blocks.shape[1], 1).squeeze(2)

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.float16 if self.scale_dtype == "float16" else torch.float32

    def learned_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of learned scales: one for each part that shares one."""
        rows, columns = shape
        groups = groups_of(columns, self.columns_of(columns))
        return {"tensor": (1, 1), "row": (rows, 1), "group": (rows, groups)}.get(
            self.scope, (self.shards, 1) if self.shard_along == "output" else (1, self.shards)
        )

    def in_memory(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Tensors where codes are made."""
        return tuple(tensor.detach().cpu() for tensor in tensors)
