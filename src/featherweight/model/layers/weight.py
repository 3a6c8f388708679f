"""The weight of a compressed layer, as other code sees it: a tensor to read, decoded when its values are needed.

Shape, dtype and device are known without decoding. Whatever looks at values gets a plain tensor, decoded for this use.
Writing is refused: what is written to a decoded matrix would be gone with it, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from featherweight.errors import FeatherError

_KNOWN = (
    *("dtype", "device", "shape", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "layout", "is_meta"),
    *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_quantized", "is_sparse", "is_nested", "itemsize", "nbytes", "names"),
    *("output_nr", "retains_grad", "_version", "_backward_hooks"),
)
_ASKED = (
    *("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex", "__len__"),
    *("is_contiguous", "stride", "storage_offset", "is_shared", "is_inference", "get_device", "__hash__"),
)
METADATA = {getattr(Tensor, name).__get__ for name in _KNOWN if hasattr(getattr(Tensor, name, None), "__get__")}
METADATA |= {getattr(Tensor, name) for name in _ASKED if hasattr(Tensor, name)}
"""What is answered without decoding."""

SETTERS = {"__set__", "__delete__", "__setitem__"}


class DecodedWeight(Tensor):
    """Stands for the matrix [out_features, in_features] of a code.

    Parameters
    ----------
    decode : makes the matrix, a plain tensor of this shape, dtype and on this device
    shape, dtype, device : of the matrix
    refusal : the sentence with which writing is refused
    """

    _is_hf_initialized = True  # transformers must not initialise it
    _decode: Callable[[], Tensor]
    _refusal: str

    @staticmethod
    def __new__(
        cls: Any,
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        refusal: str,
    ) -> DecodedWeight:
        made: DecodedWeight = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        made._decode, made._refusal = decode, refusal
        return made

    def matrix(self) -> Tensor:
        """The values, a plain tensor of its own."""
        return self._decode()

    @property
    def data(self) -> DecodedWeight:
        """Itself: what is written there would be lost as well."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise FeatherError(self._refusal)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "requires_grad_" and False in (*args[1:], *kwargs.values()):
            return args[0]
        written: list[Any] = [kwargs.get("out")]
        if name in SETTERS or _writes(name):
            written += args[:1] or kwargs.values()  # nn.init names its tensor
        return _applied(func, args, kwargs, written)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        named = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        return _applied(func, args, kwargs, [*written, kwargs.get("out")])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedWeight(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.matrix().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.matrix()


def _writes(name: str) -> bool:
    """Whether a method of this name changes its tensor: `add_`, `__iadd__`, `resize_`."""
    in_place = name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
    return in_place or (name.endswith("_") and not name.endswith("__"))


def _applied(func: Any, args: Any, kwargs: Any, written: list[Any]) -> Any:
    """`func` of the decoded values. FeatherError where it would write to one."""
    for value in tree_flatten(written)[0]:
        if isinstance(value, DecodedWeight):
            raise FeatherError(value._refusal)
    leaves, form = tree_flatten((args, kwargs))
    matrices: dict[int, Tensor] = {}  # each is decoded once, however often it is an argument
    for leaf in leaves:
        if isinstance(leaf, DecodedWeight) and id(leaf) not in matrices:
            matrices[id(leaf)] = leaf.matrix()
    args, kwargs = tree_unflatten([matrices.get(id(leaf), leaf) for leaf in leaves], form)
    return func(*args, **kwargs)
