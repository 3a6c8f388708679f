"""Products with compressed weights: codes packed into operands, and the operators that read them."""

from featherweight.model.products.dispatch import ready
from featherweight.model.products.gpu import GpuLinear, pack_gpu
from featherweight.model.products.ops import apply_terms, register_kernels
from featherweight.model.products.pack import PackedLinear, pack_code, pack_dense, pack_linear

__all__ = [
    "GpuLinear",
    "PackedLinear",
    "apply_terms",
    "pack_code",
    "pack_dense",
    "pack_gpu",
    "pack_linear",
    "ready",
    "register_kernels",
]
