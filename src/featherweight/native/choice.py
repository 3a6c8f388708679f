"""Native or PyTorch: the one place that decides by which of its two forms a computation of this room is done.

The native library works on main memory. Tensors of any other device go through the PyTorch form, which defines the
native one: its results are the same up to the order in which a device adds up, and the same bits where that order is
the CPU's (float64 is needed for the solvers, see `featherweight.system.devices.solving_device`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Backend = Literal["auto", "native", "reference"]


def may_be_native(backend: Backend, *tensors: Tensor | None) -> bool:
    """Whether the native form may be used: PyTorch's was not asked for, and every tensor lies in main memory."""
    return backend != "reference" and all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)
