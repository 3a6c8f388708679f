"""Modules other than linear layers whose weight is a code: they keep their own forward, which reads `weight`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.model import products as operators
from featherweight.model.layers.modules import CodedModule

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Those whose weight is a matrix [out, in / groups * product of kernel]; transposed ones are not."""


class CodedForward(CodedModule):
    """Gives a class's own forward the decoded matrix as `self.weight`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["weight"] = self._decoded(self.compute_dtype)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.pop("weight", None)


class CodedEmbedding(CodedForward):
    """Decodes the rows that are asked for alone, where the native library can."""

    def forward(self, input: Tensor) -> Tensor:
        wanted, places = torch.unique(input, return_inverse=True)
        rows = None if self.precision == "exact" or self.cache else self._rows(wanted)
        if rows is None:
            return super().forward(input)  # type: ignore[no-any-return]
        return F.embedding(places, rows.to(self.compute_dtype))

    def _rows(self, wanted: Tensor) -> Tensor | None:
        """Rows of the matrix, float32; None where decoding all of it is the way."""
        inside = 0 < len(wanted) < self.spec["shape"][0] and int(wanted[0]) >= 0  # ascending
        if not inside or int(wanted[-1]) >= self.spec["shape"][0] or wanted.device.type != "cpu":
            return None
        packed = self.packed()
        return packed.weight_rows(wanted.tolist()) if isinstance(packed, operators.PackedLinear) else None


class CodedConvolution(CodedForward):
    """A convolution whose code is that of its weight as a matrix [out, in / groups * product of kernel].

    `weight` has the shape of the kernels, [out, in / groups, *kernel], and is decoded for each call; `decode()` gives
    the matrix.
    """

    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    def _weight_shape(self) -> tuple[int, ...]:
        return self.spec["shape"][0], self.in_channels // self.groups, *self.kernel_size

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        return super()._decoded(dtype).view(self._weight_shape())


def coded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module class whose `weight` is decoded from a code, for classes other than linear layers."""
    base = CodedConvolution if issubclass(cls, Convolution) else CodedForward
    if issubclass(cls, nn.Embedding) and cls.forward is nn.Embedding.forward:
        base = CodedEmbedding
    return type(f"Feather{cls.__name__}", (base, cls), {})
