"""Compiles the kernels ahead of time for a GPU that need not be there; run as a script, by `test_triton_compile.py`.

The operators are called on the CPU with a recorder in the place of every kernel, which compiles what would be launched.
The results are meaningless; what counts is that code for the GPU exists. Prints a line for each kernel made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from featherweight.model.products.triton import activations, launch, operators, packed

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
}


class Recorder:
    """Stands for a kernel: `recorder[grid](...)` compiles the kernel for these arguments and tells `seen`."""

    def __init__(self, kernel: Any, capability: int, seen: Callable[[str, Any], None]) -> None:
        self.kernel, self.capability, self.seen = kernel, capability, seen

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature, constants, hints = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                hints[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif value == 1:  # as a launch would
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0:
                    hints[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        options.setdefault("enable_fp_fusion", True)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self.seen(self.kernel.__name__, compiled)


def install(capability: int, seen: Callable[[str, Any], None]) -> None:
    """Recorders in the place of all kernels."""
    for module in (operators, packed, activations):
        for name in (
            "matvec_kernel",
            "matvec_int8_kernel",
            "tiles_kernel",
            "group_tiles_kernel",
            "epilogue_kernel",
            "hadamard_kernel",
            "quantize_kernel",
        ):
            if hasattr(module, name):
                setattr(module, name, Recorder(getattr(module, name), capability, seen))


def main() -> None:
    import cases  # beside this file

    capability, whole = int(sys.argv[1]), sys.argv[2] == "whole"

    def seen(name: str, compiled: Any) -> None:
        print(f"{name} for {capability}: {len(compiled.asm['cubin'])} bytes", flush=True)

    assert not launch.interpreted()
    install(capability, seen)
    for code, tokens, dtype, packing, precision in cases.for_compilation(whole):
        cases.call(code, tokens, dtype, packing, precision)


if __name__ == "__main__":
    main()
