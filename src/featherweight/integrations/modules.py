"""Layers that hold a code instead of a weight matrix.

`FeatherLinear` is an `nn.Module`, not an `nn.Linear`: code that sees an `nn.Linear` may write to `weight.data` (weight
initialisation, merging an adapter), and with a weight that is decoded on each access such a write would be lost without
a word. `in_features`, `out_features`, `bias` and a readable `weight` are there, which is what PEFT's layers need.

The stored tensors are parameters without gradient, not buffers, because offloading (accelerate) moves parameters only.
Their dtype is part of the format: `.to(torch.bfloat16)` moves them but never converts them, since an fp16 scale rounded
to bf16 would change the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.codes import TensorLayout, code_from, code_layout
from featherweight.errors import CheckpointError, FeatherError
from featherweight.quantize.activations import quantized_inputs


class CodedModule(nn.Module):
    """A module whose `weight` is a code: what all compressed layers share. `hold` makes a module one.

    Attributes:
        spec: the code's spec, with `shape`.
        layout: shape and dtype of each stored tensor, by parameter name.
        name: the module's name in the checkpoint, for error messages.
        compute_dtype: dtype of the decoded `weight`; follows `.to(dtype)`.
        cache: see `set_cache`.
    """

    spec: dict[str, Any]
    layout: dict[str, TensorLayout]
    name: str
    compute_dtype: torch.dtype
    cache: bool
    _cached: Tensor | None
    bias: nn.Parameter | None

    def hold(
        self, spec: dict[str, Any], name: str, compute_dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        """Make the (uninitialised) stored tensors. CheckpointError if the spec is wrong."""
        try:
            self.layout = code_layout(spec)
        except (FeatherError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the code of the module {name!r} in quantization_config cannot be read ({error}): "
                "install a newer featherweight, or compress the model again"
            ) from None
        self.spec = dict(spec)
        self.name = name
        self.compute_dtype = compute_dtype
        self.cache = False
        self._cached = None
        self._is_hf_initialized = True  # transformers must not initialise what it loads
        for key, (shape, dtype) in self.layout.items():  # not register_parameter: a dense code's tensor is `weight`
            self._parameters[key] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        """`weight` is the decoded matrix in `compute_dtype`, unless the code stores a tensor of that name."""
        if name == "weight" and name not in self.__dict__["_parameters"]:
            return self._decoded(self.compute_dtype)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and name not in self._parameters:
            raise CheckpointError(
                f"the weight of the compressed layer {self.name!r} cannot be assigned (it is decoded from "
                f"{', '.join(self.layout)}): untie it, or leave this layer uncompressed"
            )
        super().register_parameter(name, param)

    def decode(self) -> Tensor:
        """The matrix the stored tensors stand for: float32 [out_features, in_features]. CheckpointError if damaged."""
        stored = {key: self._parameters[key].detach() for key in self.layout}  # type: ignore[union-attr]
        if any(tensor.is_meta for tensor in stored.values()):
            return torch.empty(*self.spec["shape"], dtype=torch.float32, device="meta")
        device = next(iter(stored.values())).device
        try:  # on the CPU: the decoding kernels take no other tensors
            return code_from(self.spec, {key: tensor.cpu() for key, tensor in stored.items()}).decode().to(device)
        except ValueError as error:
            raise CheckpointError(
                f"the compressed layer {self.name!r} is damaged ({error}): download or compress the model again"
            ) from None

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        if not self.cache:
            return self.decode().to(dtype)
        device = self._parameters[next(iter(self.layout))].device  # type: ignore[union-attr]
        if self._cached is None or self._cached.dtype != dtype or self._cached.device != device:
            self._cached = self.decode().to(dtype)
        return self._cached

    def settle(self) -> None:
        """Undo what a loader may have done to the stored tensors: a wider dtype, a gradient."""
        for key, (_, dtype) in self.layout.items():
            stored = self._parameters[key]
            assert stored is not None
            if stored.dtype != dtype:
                self._parameters[key] = nn.Parameter(self._exact(key, stored.detach(), dtype), requires_grad=False)
            stored.requires_grad_(False)

    def _exact(self, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_meta and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            raise CheckpointError(
                f"tensor {self.name + '.' + key!r} is {tensor.dtype} and does not fit {dtype} exactly: "
                "the file does not match its quantization_config, compress the model again"
            )
        return tensor.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {key: self._parameters[key].data for key in self.layout}  # type: ignore[union-attr]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self._cached = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, (_, dtype) in self.layout.items():
            moved = self._parameters[key]
            assert moved is not None
            if moved.dtype != dtype:  # converted: take the new device, not the new dtype
                self._parameters[key] = nn.Parameter(before[key].to(moved.device), requires_grad=False)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, (shape, dtype) in self.layout.items():
            found = state_dict.get(prefix + key)
            if found is None:
                continue
            if tuple(found.shape) != shape or found.is_floating_point() != dtype.is_floating_point:
                raise CheckpointError(
                    f"tensor {self.name + '.' + key!r} is {found.dtype} {list(found.shape)}, expected {dtype} "
                    f"{list(shape)}: the file does not match its quantization_config, compress the model again"
                )
            if found.dtype != dtype:
                state_dict[prefix + key] = self._exact(key, found, dtype)
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.spec.items() if k != "shape")
        return f"out_features={self.spec['shape'][0]}, in_features={self.spec['shape'][1]}, {settings}"


class FeatherLinear(CodedModule):
    """y = x W^T + b with W [out_features, in_features] decoded from its code in each call.

    Where the code says so (`quantized-input`, outermost), x is rounded to integers first.

    Args:
        spec: the code's spec, with `shape`.
        bias: whether there is a bias [out_features], kept in `compute_dtype`.
        name: the module's name, for error messages.
        compute_dtype: dtype of `weight` and `bias`; follows `.to(dtype)`.
        device: where the (uninitialised) tensors are made, `meta` for none.

    Raises:
        CheckpointError: the spec is wrong.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        bias: bool = False,
        *,
        name: str = "",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.hold(spec, name, compute_dtype or torch.get_default_dtype(), device)
        self.out_features, self.in_features = spec["shape"]
        values = torch.empty(self.out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    def forward(self, input: Tensor | None = None) -> Tensor:
        """`input` [..., in_features] -> [..., out_features]; without an input, the weight itself.

        Another module that needs the matrix calls the layer rather than reading `weight`, so that offloading hooks run.
        """
        if input is None:
            return self._decoded(self.compute_dtype)
        if self.spec["kind"] == "quantized-input":
            return self._integer_product(input)
        return F.linear(input, self._decoded(input.dtype), self.bias)

    def _integer_product(self, input: Tensor) -> Tensor:
        """The product with the input rounded to integers, in float32 as their kernels accumulate."""
        rounded = quantized_inputs(input, self.spec["bits"], self.spec["group_size"])
        product = F.linear(rounded, self._decoded(torch.float32)).to(input.dtype)
        return product if self.bias is None else product + self.bias


class CodedForward(CodedModule):
    """Gives a class's own forward the decoded matrix as `self.weight`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["weight"] = self._decoded(self.compute_dtype)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__.pop("weight", None)


def coded_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module class whose `weight` is decoded from a code, for classes other than linear layers."""
    return type(f"Feather{cls.__name__}", (CodedForward, cls), {})


def set_cache(model: nn.Module, enabled: bool) -> None:
    """Let every compressed layer keep its matrix after the first call, trading the memory saved for speed, or not."""
    for module in model.modules():
        if isinstance(module, CodedModule):
            module.cache = enabled
            module._cached = None


class FeatherConv1D(FeatherLinear):
    """Stands for GPT-2's `Conv1D`: the same product in that layer's order, so that results agree to the bit."""

    def forward(self, input: Tensor | None = None) -> Tensor:
        if input is None or self.bias is None or self.spec["kind"] == "quantized-input":
            return super().forward(input)
        weight = self._decoded(input.dtype).T.contiguous()  # [in_features, out_features]
        product = torch.addmm(self.bias, input.reshape(-1, self.in_features), weight)
        return product.view(*input.shape[:-1], self.out_features)


class PlainMatrix(nn.Linear):
    """An uncompressed layer among compressed ones, with the same way of asking for the matrix."""

    def forward(self, input: Tensor | None = None) -> Tensor:
        return self.weight if input is None else super().forward(input)
