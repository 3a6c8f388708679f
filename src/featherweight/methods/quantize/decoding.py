"""Differentiable decoding: the matrix of a code as a function of its stored scales, with the digits fixed.

Every kind of code is a frozen dataclass whose floating-point tensors (scales, offsets, look-up tables, factors) enter
`decode` by differentiable arithmetic. `TunableCode` puts float32 tensors that require gradients in their place,
through wrapper codes (a field that is a code) and sums (a field that is a tuple of codes) down to the leaves. Codes
that are scales times small integers keep these unpacked between calls; other kinds decode as they always do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.storage.codes.base import Code, TensorLayout


class TunableCode:
    """A code whose floating-point tensors can be varied.

    `parameters` maps a path ("scales", "inner.scales", "terms.0.scales") to a float32 copy of the stored tensor.
    Plain weights (`dense`) are not among them: they are left as they are.

    device : of the parameters and of what `decode` gives; the code itself is in main memory, and so is the decoding of
        what is not scales times small integers
    """

    def __init__(self, code: Code, prefix: str = "", device: torch.device | None = None) -> None:
        self.code, self.device = code, device or torch.device("cpu")
        self._prefix = prefix
        self._children: dict[str, TunableCode | tuple[TunableCode, ...]] = {}
        self._own = code.tunable_fields()
        for name in _fields(code):
            value = getattr(code, name)
            if isinstance(value, Code):
                self._children[name] = self._part(value, f"{prefix}{name}.")
            elif isinstance(value, tuple) and value and all(isinstance(item, Code) for item in value):
                self._children[name] = tuple(self._part(item, f"{prefix}{name}.{i}.") for i, item in enumerate(value))
        digits = code.digits()
        self._digits = None if digits is None else digits.to(self.device)

    def _part(self, code: Code, prefix: str) -> TunableCode:
        """A code within this one."""
        return TunableCode(code, prefix, self.device)

    @property
    def units(self) -> dict[str, Tensor]:
        """Sizes of a change of parameters whose own values say nothing of it, by path; they broadcast."""
        return {}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """float32 copies of all floating-point tensors, by path."""
        own = {name: getattr(self.code, name).detach() for name in self._own}
        found = {self._prefix + name: value.to(self.device, torch.float32, copy=True) for name, value in own.items()}
        for child in self._leaves():
            found |= child.parameters
        return found

    def _leaves(self) -> list[TunableCode]:
        return [c for child in self._children.values() for c in (child if isinstance(child, tuple) else (child,))]

    def decode(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """float32 [out, in] with these values in place of the stored ones; differentiable in them."""
        own = {name: parameters[self._prefix + name] for name in self._own}
        if self._digits is not None:
            value: Tensor = _GroupScaled.apply(scales_by_plane(own), self._digits)  # type: ignore[no-untyped-call]
            return value[:, : self.code.shape[1]]
        own = {name: value.cpu() for name, value in own.items()}
        moved = self._replaced(own, lambda child: _Decoded(child.decode(parameters).cpu()))
        return moved.decode_fast().to(self.device)

    def stored(self, parameters: Mapping[str, Tensor]) -> Code:
        """The code with these values, rounded to the types in which they are stored."""
        own = {
            name: parameters[self._prefix + name].detach().to("cpu", getattr(self.code, name).dtype, copy=True)
            for name in self._own
        }
        return self._replaced(own, lambda child: child.stored(parameters))

    def _replaced(self, own: dict[str, Tensor], child: Any) -> Code:
        changes: dict[str, Any] = dict(own)
        for name, value in self._children.items():
            changes[name] = tuple(child(c) for c in value) if isinstance(value, tuple) else child(value)
        if not changes:
            return self.code
        return self.code.replaced(changes)


def scales_by_plane(own: Mapping[str, Tensor]) -> Tensor:
    """[out, groups, planes] of the fields `scales` and, where there are such, `offsets` of a code with digits."""
    scales = own["scales"].reshape(*own["scales"].shape[:2], -1)
    return torch.cat([scales, own["offsets"].unsqueeze(-1)], -1) if "offsets" in own else scales


def _fields(code: Code) -> list[str]:
    return [field.name for field in dataclasses.fields(code)] if dataclasses.is_dataclass(code) else []


def group_values(digits: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, groups, size]: the sum over planes of digits [planes, out, groups, size] times scales [out, groups,
    planes], added up as decoding for training does."""
    value = digits[0].float().mul_(scales[..., 0].unsqueeze(-1))
    for plane in range(1, len(digits)):
        value.addcmul_(digits[plane].float(), scales[..., plane].unsqueeze(-1))
    return value


def scale_gradients(gradient: Tensor, digits: Tensor) -> Tensor:
    """[out, groups, planes]: what scales get of a gradient [out, groups, size] of `group_values`."""
    return torch.stack([torch.einsum("ogs,ogs->og", gradient, plane.to(gradient.dtype)) for plane in digits], -1)


class _GroupScaled(torch.autograd.Function):
    """`group_values`, flattened to [out, groups x size]; keeps only the digits."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, digits: Tensor) -> Tensor:
        ctx.save_for_backward(digits)
        return group_values(digits, scales).view(scales.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (digits,) = ctx.saved_tensors
        return scale_gradients(gradients[0].reshape(digits.shape[1:]), digits), None


@dataclasses.dataclass(frozen=True)
class _Decoded(Code):
    """Stands in for an inner code while a wrapper decodes."""

    value: Tensor
    kind = "decoded"

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.value.shape[0], self.value.shape[1]

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape)}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def decode(self) -> Tensor:
        return self.value

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        raise TypeError("a decoded matrix is not stored")

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Code:
        raise TypeError("a decoded matrix is not stored")
