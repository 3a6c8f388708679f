"""Products with compressed weights on a GPU, in Triton. Importing this package needs neither Triton nor a GPU.

    operands = pack_terms(code.spec, code.tensors())      # once, at load
    operands = [operand.to("cuda") for operand in operands]
    y = linear(x, operands, bias)                         # x [..., in] float16, bfloat16 or float32

`operand` describes the layouts, `repack` makes them (PyTorch alone, on the CPU), `matvec` and `tiles` multiply in
floating point, `int8` with activations of 8 bits, `activations` rotates and rounds inputs, `epilogue` adds up.

Checked against the PyTorch codes in Triton's interpreter and compiled ahead of time for compute capability 8.0 and 9.0;
not yet run or measured on a GPU. `benchmarks/gpu_matvec.py` is the measurement.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight.model.products.triton.activations import hadamard, quantize
    from featherweight.model.products.triton.operand import GpuOperand
    from featherweight.model.products.triton.operators import linear, matmul
    from featherweight.model.products.triton.repack import pack_for_gpu, pack_terms

__all__ = ["GpuOperand", "available", "hadamard", "linear", "matmul", "pack_for_gpu", "pack_terms", "quantize"]

_HOMES = {
    "GpuOperand": "operand",
    "pack_for_gpu": "repack",
    "pack_terms": "repack",
    "hadamard": "activations",
    "quantize": "activations",
    "linear": "operators",
    "matmul": "operators",
}


def available() -> bool:
    """Whether Triton is installed; its kernels also need a GPU, or TRITON_INTERPRET=1 before its first import."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # a mere folder of this name has no origin


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
