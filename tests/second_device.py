"""A second device where there is none: tensors that say they are on it, and whose values are in main memory.

Within `second_device()` torch makes tensors on DEVICE and moves them there and back. An operation that is given tensors
of both devices, or memory of this one that it cannot reach, fails as it would with a GPU. Values are computed on the
CPU, so a run with the second device gives the same bits as one without.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from featherweight.system import precision

DEVICE = torch.device("lazy", 0)  # a kind of device that torch knows by name alone


class Meter:
    """Bytes of the second device's tensors that are alive, and the most that ever were. What an operation takes within
    is not seen."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._users: dict[int, int] = {}

    def add(self, tensor: OnDevice) -> None:
        """Count the memory behind a tensor as long as it, or another one with the same memory, is there."""
        storage = tensor.inner.untyped_storage()
        if storage.nbytes():
            weakref.finalize(tensor, self._drop, storage.data_ptr(), storage.nbytes()).atexit = False
            self._users[storage.data_ptr()] = users = self._users.get(storage.data_ptr(), 0) + 1
            self.now += storage.nbytes() if users == 1 else 0
            self.most = max(self.most, self.now)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.now -= size


METERS: list[Meter] = []


@contextmanager
def metered() -> Iterator[Meter]:
    """Within, a meter counts."""
    METERS.append(Meter())
    try:
        yield METERS[-1]
    finally:
        METERS.pop()


class OnDevice(Tensor):
    """A tensor of the second device."""

    inner: Tensor

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        for meter in METERS:
            meter.add(made)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner!r})"

    @property
    def data(self) -> OnDevice:  # type: ignore[override]
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: OnDevice) -> None:
        if not isinstance(value, OnDevice) or (value.shape, value.dtype) != (self.shape, self.dtype):
            raise RuntimeError(f"values {value.dtype} {list(value.shape)} of {value.device} do not fit here")
        self.inner = value.inner.detach()
        for meter in METERS:
            meter.add(self)

    def tolist(self) -> Any:
        """As for a GPU's tensor, which is moved for it."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        raise RuntimeError(f"memory of {DEVICE} is not within reach")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Also sees what makes tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Making(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)`, which does not come as far as `Mode`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.to.device:  # which inference mode leaves whole
        func = torch.ops.aten._to_copy.default
        args, kwargs = args[:1], {"dtype": args[0].dtype, **dict(zip(("device", "dtype"), args[1:], strict=False))}
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    here = [leaf for leaf in leaves if not isinstance(leaf, OnDevice)]
    device = kwargs.get("device")
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    onto = bool(there) if device is None else torch.device(device).type == DEVICE.type
    indexed = name in ("index", "index_put", "_index_put_impl") and isinstance(args[0], OnDevice)  # also by the CPU's
    if there and any(leaf.dim() > 0 for leaf in here) and not indexed and name not in ("copy", "_to_copy"):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    if name in ("_pin_memory", "set", "resize") and there:
        raise RuntimeError(f"{func} is not for {DEVICE}")
    plain = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if device is not None:
        plain[1]["device"] = torch.device("cpu") if onto else torch.device(device)
    generator = kwargs.get("generator")
    if onto and generator is not None:
        raise RuntimeError(f"{func}: expected a generator of {DEVICE}, but found one of the cpu")
    found = func(*plain[0], **plain[1])
    written = {id(leaf.inner): leaf for leaf in there}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in written:  # in place
            return written[id(value)]
        return OnDevice(value) if onto else value

    return tree_map(wrapped, found)


@contextmanager
def comparable_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU does as the second device, which knows no fused attention, and no bfloat16 of its own."""
    monkeypatch.setattr(precision, "bfloat16_time_ratio", lambda *_: float("inf"))
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within, torch has DEVICE."""
    asked = torch.is_autocast_enabled  # of kinds of devices that autocast knows

    def is_autocast_enabled(*kind: str) -> bool:
        return False if kind == (DEVICE.type,) else asked(*kind)

    of_kind = mock.patch.object(torch, DEVICE.type, torch.cpu, create=True)  # as there is a torch.cuda
    with Mode(), Making(), of_kind, mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled):
        yield DEVICE
