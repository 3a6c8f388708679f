"""Layers that hold a code instead of a weight matrix.

`FeatherLinear` is an `nn.Linear`, so that PEFT and whatever else looks for linear layers finds them. Its `weight` is no
parameter: it knows its shape, dtype and device, is decoded when its values are read, and refuses to be written to (see
weight.py), as weight initialisation or merging an adapter would. A product that is differentiated keeps no decoded
matrix for the way back, where it is decoded again: training adapters takes the memory of the codes.

The stored tensors are parameters without gradient, not buffers, because offloading (accelerate) moves parameters only.
Their dtype is part of the format: `.to(torch.bfloat16)` moves them but never converts them, since an fp16 scale rounded
to bf16 would change the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import CheckpointError, FeatherError
from featherweight.model import products as operators
from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.weight import DecodedWeight
from featherweight.storage.codes import Code, TensorLayout, code_from, code_layout
from featherweight.storage.codes.base import code_class
from featherweight.system.memory import give_back_file_pages

PRECISIONS = ("exact", "float", "int8")
MOST_SEQUENCES = 16
"""With precision "float", up to so many sequences take a generation step through the packed operators."""

OPERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Packed = operators.PackedLinear | operators.GpuLinear

_packing = threading.Lock()


class CodedModule(nn.Module):
    """A module whose `weight` is a code: what all compressed layers share. `hold` makes a module one.

    Attributes
    ----------
    spec : the code's spec, with `shape`.
    layout : shape and dtype of each stored tensor, by parameter name.
    name : the module's name in the checkpoint, for error messages.
    compute_dtype : dtype of the decoded `weight`; follows `.to(dtype)`.
    input_rounding : (bits, columns with one step) to which the code wants the layer's input rounded, or None.
    factored : whether it is multiplied with as two factors, see `set_precision`.
    cache : see `set_cache`.
    precision : see `set_precision`.
    """

    spec: dict[str, Any]
    layout: dict[str, TensorLayout]
    name: str
    compute_dtype: torch.dtype
    input_rounding: tuple[int, int] | None
    factored: bool
    cache: bool
    precision: str
    _cached: Tensor | None
    _packed: tuple[tuple[int, ...], Packed | None] | None  # with the addresses of what was packed

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
        self.input_rounding = code_class(spec).input_rounding(spec)
        self.factored = code_class(spec).factored
        self.name = name
        self.compute_dtype = compute_dtype
        self.cache = False
        self.precision = "float"
        self._cached = None
        self._packed = None
        if not self._buffers:  # transformers must not initialise what it loads, but for the scale of an embedding
            self._is_hf_initialized = True
        for key, (shape, dtype) in self.layout.items():  # not register_parameter: a dense code's tensor is `weight`
            self._parameters[key] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        """`weight` stands for the decoded matrix in `compute_dtype`, unless the code stores a tensor of that name."""
        if name == "weight" and name not in self.__dict__["_parameters"]:
            return self._weight()
        return super().__getattr__(name)

    def _weight(self) -> DecodedWeight:
        """The weight, to read; FeatherError where it is written to."""
        dtype = self.compute_dtype
        refusal = (
            f"the weight of the compressed layer {self.name!r} cannot be written to (it is decoded from "
            f"{', '.join(self.layout)}): keep an adapter beside it, or change the original model and compress that"
        )
        return DecodedWeight(lambda: self._decoded(dtype), self._weight_shape(), dtype, self._stored_device(), refusal)

    def _weight_shape(self) -> tuple[int, ...]:
        return tuple(self.spec["shape"])

    def _stored_device(self) -> torch.device:
        return self._parameters[next(iter(self.layout))].device  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and name not in self.__dict__.get("_parameters", {}) and "layout" in self.__dict__:
            raise self._not_assigned()
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and name not in self._parameters:
            raise self._not_assigned()
        super().register_parameter(name, param)

    def _not_assigned(self) -> CheckpointError:
        return CheckpointError(
            f"the weight of the compressed layer {self.name!r} cannot be assigned (it is decoded from "
            f"{', '.join(self.layout)}): untie it, or leave this layer uncompressed"
        )

    def decode(self) -> Tensor:
        """The matrix the stored tensors stand for: float32 [out_features, in_features]. CheckpointError if damaged."""
        stored = self._stored()
        if any(tensor.is_meta for tensor in stored.values()):
            return torch.empty(*self.spec["shape"], dtype=torch.float32, device="meta")
        return self._read(stored, lambda code: (code.decode(),))[0]

    def _stored(self) -> dict[str, Tensor]:
        return {key: self._parameters[key].detach() for key in self.layout}  # type: ignore[union-attr]

    def _read(self, stored: dict[str, Tensor], read: Callable[[Code], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `read` decodes of the code, on the device of the stored tensors. CheckpointError if it is damaged."""
        device = next(iter(stored.values())).device
        try:  # on the CPU: the decoding kernels take no other tensors
            code = code_from(self.spec, {key: tensor.cpu() for key, tensor in stored.items()})
            return tuple(tensor.to(device) for tensor in read(code))
        except ValueError as error:
            raise self._damaged(error) from None
        finally:
            if self._packed is not None and self._packed[1] is not None:
                self._give_back(stored)

    @staticmethod
    def _give_back(stored: dict[str, Tensor]) -> None:
        """Keep a layer in memory once: what is mapped from the checkpoint is read from there again when needed."""
        for tensor in stored.values():
            give_back_file_pages(tensor)

    def _damaged(self, error: ValueError) -> CheckpointError:
        return CheckpointError(
            f"the compressed layer {self.name!r} is damaged ({error}): download or compress the model again"
        )

    def packed(self) -> Packed | None:
        """The matrix as the operators read it, made at the first call; None where they cannot be used.

        Its memory is kept until the stored tensors move or are replaced. Theirs is given back where they are mapped
        from a file, and read again when something asks for them. CheckpointError if they are damaged.
        """
        parameters, held = self._parameters, self._packed
        if parameters[next(iter(self.layout))].device.type not in ("cpu", "cuda"):  # type: ignore[union-attr]
            return None
        key = tuple([parameters[name].data_ptr() for name in self.layout])  # type: ignore[union-attr]
        if held is not None and held[0] == key:
            return held[1]
        stored = {name: parameters[name].detach() for name in self.layout}  # type: ignore[union-attr]
        devices = {tensor.device for tensor in stored.values()}
        device = devices.pop()
        if devices or not (device.type == "cuda" or (device.type == "cpu" and operators.ready())):
            return None
        with _packing:
            if self._packed is None or self._packed[0] != key:
                self._packed = key, self._pack(stored, device)
        return self._packed[1]

    def _pack(self, stored: dict[str, Tensor], device: torch.device) -> Packed | None:
        try:
            if device.type == "cpu":
                packed = operators.pack_linear(self.spec, stored)
                self._give_back(stored)
                return packed
            with torch.cuda.device(device):
                return operators.pack_gpu(self.spec, stored, device)
        except ValueError as error:
            raise self._damaged(error) from None

    def release(self) -> None:
        """Free what can be made again from the stored tensors: the packed and the cached matrix."""
        self._packed = self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it holds addresses

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        if not self.cache:
            return self.decode().to(dtype)
        device = self._stored_device()
        if self._cached is None or self._cached.dtype != dtype or self._cached.device != device:
            self._cached = self.decode().to(dtype)
        return self._cached

    def settle(self) -> None:
        """Undo what a loader may have done to the stored tensors: a wider dtype, a gradient."""
        self._packed = None
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
        self.release()
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
        self.release()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.spec.items() if k != "shape")
        return f"out_features={self.spec['shape'][0]}, in_features={self.spec['shape'][1]}, {settings}"


class _Product(torch.autograd.Function):
    """x W^T + b that keeps no matrix for the way back: it is decoded again there."""

    @staticmethod
    def forward(input: Tensor, bias: Tensor | None, layer: FeatherLinear) -> Tensor:
        return layer.multiply(input, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, FeatherLinear], output: Tensor) -> None:
        ctx.dtype, ctx.layer = inputs[0].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_input = gradients[0] @ ctx.layer._decoded(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradients[0].reshape(-1, gradients[0].shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_input, to_bias, None


class FeatherLinear(CodedModule, nn.Linear):
    """y = x W^T + b with W [out_features, in_features] held as a code.

    Where the code says so (`quantized-input`, outermost), x is rounded to integers first. The product is that of the
    native operators, or of PyTorch with the matrix (of a product: its two factors) decoded in this call: see
    `set_precision`. It is differentiable in x and b; W takes no gradient.

    Parameters
    ----------
    spec : the code's spec, with `shape`.
    bias : whether there is a bias [out_features], kept in `compute_dtype`.
    name : the module's name, for error messages.
    compute_dtype : dtype of `weight` and `bias`; follows `.to(dtype)`.
    device : where the (uninitialised) tensors are made, `meta` for none.

    Raises
    ------
    CheckpointError
        the spec is wrong.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        spec: dict[str, Any],
        bias: bool = False,
        *,
        name: str = "",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which makes a weight
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
        product = self._operator_product(input)
        if product is not None:
            return product
        if self.input_rounding is not None:
            return self._integer_product(input, *self.input_rounding)
        if self.factored and not (self.cache or self.precision == "exact" or input.is_meta):
            return self._factors_product(input)
        return self._decoded_product(input, self.bias)

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """`input` times the decoded matrix by PyTorch, plus `bias`, in the dtype of `input`."""
        return F.linear(input, self._decoded(input.dtype), bias)

    def _decoded_product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """`multiply`; where it is differentiated, without keeping the matrix if that can be decoded again."""
        again = torch.is_grad_enabled() and not self.cache and self._trains(input)
        if again and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(input.device.type):
            product: Tensor = _Product.apply(input, bias, self)  # type: ignore[no-untyped-call]
            return product
        return self.multiply(input, bias)

    def _operator_product(self, input: Tensor) -> Tensor | None:
        """The product by the packed operators; None where PyTorch is to compute it."""
        if not self._takes(input):
            return None
        tracing = torch.compiler.is_compiling()
        packed = self._packed[1] if tracing and self._packed is not None else self.packed()
        if packed is None or packed.device_type != input.device.type:
            return None
        # A code that has its own rule for rounding the input is not to be rounded again.
        precision = "int8" if self.precision == "int8" and self.input_rounding is None else "float"
        if tracing and isinstance(packed, operators.PackedLinear):
            product = operators.apply_terms(input, packed.terms, None, self.out_features, precision).to(input.dtype)
        else:
            product = packed(input, precision)
        return product if self.bias is None else product + self.bias

    def _takes(self, input: Tensor) -> bool:
        """Whether the operators are to compute the product with this input, see `set_precision`."""
        if self.precision == "exact" or input.dtype not in OPERATOR_DTYPES:
            return False
        if torch.is_autocast_enabled(input.device.type) or (torch.is_grad_enabled() and self._trains(input)):
            return False
        if self.precision == "int8" or torch.compiler.is_compiling():  # decoding cannot be traced
            return True
        one_token_each = input.dim() < 2 or input.shape[-2] == 1
        return one_token_each and input.numel() <= MOST_SEQUENCES * self.in_features

    def _trains(self, input: Tensor) -> bool:
        return input.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def _integer_product(self, input: Tensor, bits: int, group_size: int) -> Tensor:
        """The product with the input rounded to integers, in float32 as their kernels accumulate."""
        rounded = quantized_inputs(input, bits, group_size)
        product = self._decoded_product(rounded, None).to(input.dtype)
        return product if self.bias is None else product + self.bias

    def _factors_product(self, input: Tensor) -> Tensor:
        """A (B x), both factors and what lies between them in the input's dtype."""
        left, right = self._read(self._stored(), lambda code: code.factors() or ())
        return F.linear(F.linear(input, right.to(input.dtype)), left.to(input.dtype), self.bias)


def set_cache(model: nn.Module, enabled: bool) -> None:
    """Let every compressed layer keep its matrix after the first call, trading the memory saved for speed, or not."""
    for module in model.modules():
        if isinstance(module, CodedModule):
            module.cache = enabled
            module._cached = None


def set_precision(model: nn.Module, precision: str) -> None:
    """How the compressed linear layers of a model multiply.

    "float" (the default): a generation step (one token of up to 16 sequences) by the operators with inputs as they are
    and float32 sums, which differ from PyTorch's in the order of the sums only (on a GPU also by what its tensor cores
    round); everything else, and so every evaluation, with the decoded matrix, or with its two decoded factors where the
    code is a product (one that is kept, see `set_cache`, is kept whole). "exact": always with the decoded matrix.
    "int8": always by the operators, with inputs rounded to 8 bits per token and group of columns; the fastest.
    Products that are differentiated are never the operators'; in a layer that is compiled or exported (see `prepare`),
    all others are.

    Raises
    ------
    ValueError
        there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    for module in model.modules():
        if isinstance(module, CodedModule):
            module.precision = precision


def prepare(model: nn.Module) -> int:
    """Pack every compressed layer now rather than at its first use; returns the bytes of memory this takes.

    `torch.compile(model, fullgraph=True)` and `torch.export` need it, since packing cannot be traced.
    """
    packed = {id(p): p for m in model.modules() if isinstance(m, FeatherLinear) for p in [m.packed()]}
    return sum(one.nbytes for one in packed.values() if one is not None)


class FeatherConv1D(FeatherLinear):
    """Stands for GPT-2's `Conv1D`: the same product in that layer's order, so that results agree to the bit."""

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return super().multiply(input, bias)
        weight = self._decoded(input.dtype).T.contiguous()  # [in_features, out_features]
        product = torch.addmm(bias, input.reshape(-1, self.in_features), weight)
        return product.view(*input.shape[:-1], self.out_features)


class PlainMatrix(nn.Linear):
    """An uncompressed layer among compressed ones, with the same way of asking for the matrix."""

    def forward(self, input: Tensor | None = None) -> Tensor:
        return self.weight if input is None else super().forward(input)
