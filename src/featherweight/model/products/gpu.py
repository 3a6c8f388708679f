"""Compressed layers on a GPU: the operands of `products/triton`, held against the decoded matrix once."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning
from featherweight.model.products import reference, triton
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.base import input_rounding
from featherweight.storage.codes.nested import Wrapper
from featherweight.storage.codes.product import Product

if TYPE_CHECKING:
    from featherweight.model.products.triton import GpuOperand

PACKING: Literal["2bit"] = "2bit"  # of trits: 2 to 3 times as fast as base 3, for a fifth more bytes (docs/results.md)
CHECKED_TOKENS = (1, 16)  # one kernel for few tokens, another for many
TOLERANCE = 5e-3  # relative; tensor cores round float32 inputs to 10 bits


class GpuLinear:
    """A linear layer as operands on a GPU, see `triton.linear`; with `second`, those of a matrix that multiplies what
    the first give: W = second times operands."""

    def __init__(self, operands: list[GpuOperand], second: list[GpuOperand] | None = None) -> None:
        self.operands = operands
        self.second = second or []
        self.device_type = operands[0].device.type

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(operand.nbytes for operand in (*self.operands, *self.second))

    def __call__(self, x: Tensor, precision: str = "float") -> Tensor:
        """x [..., in] on the operands' device -> [..., out] in its dtype.

        What goes from the first operands to the second is float32, with precision "int8" too.
        """
        rounding: Literal["int8", "float"] = "int8" if precision == "int8" else "float"
        if not self.second:
            return triton.linear(x, self.operands, None, rounding)
        between = triton.linear(x.float(), self.operands, None, rounding)
        return triton.linear(between, self.second, None, "float").to(x.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuLinear:
        return self  # nothing in it ever changes


def pack_gpu(spec: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> GpuLinear | None:
    """A stored code on a GPU; None, with one warning, where its products cannot be computed there or are wrong.

    ValueError if the code is damaged.
    """
    if not triton.available():
        return None
    stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    code = code_from(spec, stored)
    weight, (left, right) = code.decode(), factors(code)
    try:
        packed = GpuLinear(_operands(right, device), None if left is None else _operands(left, device))
        error = _error(packed, weight.to(device), spec)
    except Exception as failure:  # compilers and drivers raise anything
        _warn(f"{type(failure).__name__}: {failure}".splitlines()[0])
        return None
    if not error <= TOLERANCE:
        _warn(f"products of a {spec['kind']} code have the relative error {error:.1g}")
        return None
    return packed


def factors(code: Code) -> tuple[Code | None, Code]:
    """A product's codes, with what is done to the input on the right one; None and the code itself for all others."""
    if isinstance(code, Product):
        return code.left, code.right
    if isinstance(code, Wrapper):
        left, right = factors(code.inner)
        if left is not None:
            return left, code.replaced({"inner": right})
    return None, code


def _operands(code: Code, device: torch.device) -> list[GpuOperand]:
    return [operand.to(device) for operand in triton.pack_terms(code.spec, code.tensors(), PACKING)]


def _error(packed: GpuLinear, weight: Tensor, spec: dict[str, Any]) -> float:
    """The largest relative error of a product with random inputs."""
    errors, rounding = [], input_rounding(spec)
    for tokens in CHECKED_TOKENS:
        x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens)).to(weight.device)
        inputs = x if rounding is None else reference.rounded(x, *rounding)
        expected = inputs @ weight.T
        errors.append((packed(x) - expected).norm() / expected.norm().clamp(min=1e-30))
    return float(torch.stack(errors).max())


@functools.lru_cache(maxsize=1)  # once a process
def _warn(reason: str) -> None:
    warnings.warn(
        f"featherweight decodes some layers in each call, slowly: its GPU kernels do not work here ({reason})",
        FallbackWarning,
        stacklevel=4,
    )
