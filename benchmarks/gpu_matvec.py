"""The Triton operators on a GPU: decode against the memory's bandwidth and torch's bfloat16, and prefill.

    python benchmarks/gpu_matvec.py [--rows 14336] [--columns 4096] [--tokens 1 16 512] [--layouts NAME ...] [--json F]

Each layout multiplies as many copies of one random matrix as do not fit the second-level cache, one after another in a
CUDA graph, so that weights come from memory and launches cost what they cost in a decoder. Bandwidth is that of reading
alone in the same run (torch's sum of 4 GiB). With int8 activations "alone" is the product of activations that are
rounded already, which layers share that have one input; the other time includes the rounding. Every result is first
compared with the decoded matrix. Without a GPU it says so in one line and does nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.model.products import triton as gpu
from featherweight.model.products.triton.packed import int8_product
from featherweight.storage.codes.base import Code
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.sherry import Sherry
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

GROUP = 128
WARM_BYTES = 4  # times the second-level cache that the copies of a matrix take
MOST_COPIES = 64


def random_code(name: str, rows: int, columns: int) -> Code:
    """A code of a random matrix: speed does not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    groups = -(-columns // GROUP)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8 if low < 0 else torch.uint8)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5) / columns**0.5

    family, _, rest = name.partition("-")
    if family == "trit":
        planes, tied = int(rest[0]), rest.endswith("tied")
        per_group = () if tied else (planes,)
        return TritPlanes.encode(
            integers(-1, 2, planes, rows, columns), scales(rows, groups, *per_group), GROUP, tied=tied
        )
    if family == "uniform":
        bits = int(rest)
        zeros = integers(0, 1 << bits, rows, groups)
        return Uniform.encode(integers(0, 1 << bits, rows, columns), scales(rows, groups), zeros, bits, GROUP)
    if family == "codebook":
        bits = int(rest)
        table = torch.randn(rows, 1 << bits, generator=generator) / columns**0.5
        return Codebook.encode(integers(0, 1 << bits, rows, columns), table)
    return Sherry.encode(integers(0, 32, rows, columns // 4), scales(rows, groups).half(), (rows, columns), GROUP)


LAYOUTS = {  # name: (code, packing, precision, rotated)
    "trit-1 base3": ("trit-1", "base3", "float", False),
    "trit-1 2bit": ("trit-1", "2bit", "float", False),
    "trit-2 base3": ("trit-2", "base3", "float", False),
    "trit-2 2bit": ("trit-2", "2bit", "float", False),
    "trit-2-tied base3": ("trit-2-tied", "base3", "float", False),
    "trit-2-tied 2bit": ("trit-2-tied", "2bit", "float", False),
    "trit-1 2bit int8": ("trit-1", "2bit", "int8", False),
    "trit-2 2bit int8": ("trit-2", "2bit", "int8", False),
    "trit-2-tied 2bit int8": ("trit-2-tied", "2bit", "int8", False),
    "trit-2-tied 2bit int8 rotated": ("trit-2-tied", "2bit", "int8", True),
    "trit-3 base3": ("trit-3", "base3", "float", False),
    "uniform-2": ("uniform-2", "base3", "float", False),
    "uniform-3": ("uniform-3", "base3", "float", False),
    "uniform-4": ("uniform-4", "base3", "float", False),
    "uniform-8": ("uniform-8", "base3", "float", False),
    "uniform-2 int8": ("uniform-2", "base3", "int8", False),
    "uniform-4 int8": ("uniform-4", "base3", "int8", False),
    "uniform-8 int8": ("uniform-8", "base3", "int8", False),
    "codebook-4": ("codebook-4", "base3", "float", False),
    "sherry": ("sherry", "base3", "float", False),
}


def seconds(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Of one call, the calls one after another in a CUDA graph: the median of `repeats` replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # compiles, and tries the configurations
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def read_bandwidth() -> float:
    """Bytes a second of reading 4 GiB of the device's memory."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return 4 * source.numel() / seconds([lambda: source.sum()] * 2)


def copies_for(nbytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_COPIES, -(-WARM_BYTES * cache // nbytes)))


def torch_seconds(rows: int, columns: int, tokens: int) -> float:
    """torch's product in bfloat16."""
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    weights = [weight.clone() for _ in range(copies_for(2 * rows * columns))]
    return seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])  # type: ignore[misc]


def measure(layout: str, rows: int, columns: int, tokens: list[int], peers: dict[int, float], bandwidth: float) -> Any:
    name, packing, precision, rotated = LAYOUTS[layout]
    code = random_code(name, rows, columns)
    code = Hadamard(code, columns & -columns, 1) if rotated else code
    operand = gpu.pack_for_gpu(code.spec, code.tensors(), packing).to("cuda")  # type: ignore[arg-type]
    copies = [operand, *(clone(operand) for _ in range(copies_for(operand.nbytes) - 1))]
    weight = code.decode().cuda()
    found = {}
    for count in tokens:
        x = torch.randn(count, columns, device="cuda").bfloat16()
        expected = x.double() @ weight.double().t()
        y = gpu.matmul(x, operand, precision)  # type: ignore[arg-type]
        error = float((y.double() - expected).norm() / expected.norm())
        time = seconds([lambda x=x, o=o: gpu.matmul(x, o, precision) for o in copies])  # type: ignore[arg-type, misc]
        found[count] = {
            "seconds": time,
            "alone": alone_seconds(x, copies) if precision == "int8" and operand.int8_ready else time,
            "relative_error": error,
        }
        alone = found[count]["alone"]
        found[count] |= {
            "bandwidth_share": operand.nbytes / alone / bandwidth,
            "speed_over_bf16": peers[count] / alone,
            "teraflops": 2e-12 * rows * columns * count / alone,
        }
    return {"bits_per_weight": operand.bits_per_weight, "tokens": found}


def alone_seconds(x: Tensor, copies: list[gpu.GpuOperand]) -> float:
    """Of the product with activations that are rounded already."""
    layout = copies[0].layout
    assert layout is not None
    rounded = gpu.quantize(x, layout.group_size)
    outs = [torch.empty(len(x), copies[0].shape[0], dtype=x.dtype, device=x.device) for _ in copies]
    pairs = zip(copies, outs, strict=True)
    return seconds([lambda o=o, y=y: int8_product(*rounded, o, None, y) for o, y in pairs])  # type: ignore[misc]


def clone(operand: gpu.GpuOperand) -> gpu.GpuOperand:
    """The same on other memory."""
    import dataclasses

    return dataclasses.replace(operand, tensors={name: tensor.clone() for name, tensor in operand.tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available() or not gpu.available():
        print("not measured: this needs a CUDA device and Triton, and one of them is missing here", file=sys.stderr)
        return
    bandwidth = read_bandwidth()
    peers = {count: torch_seconds(args.rows, args.columns, count) for count in args.tokens}
    device = torch.cuda.get_device_name(0)
    print(f"{device}, reads {bandwidth / 1e9:.0f} GB/s; [{args.rows}, {args.columns}], groups of {GROUP}, bfloat16")
    heads = f"{'us':>9} {'alone':>9} {'of bandwidth':>12} {'x bf16':>7} {'TFLOP/s':>8} error"
    print(f"{'layout':30} {'bits':>6} {'tokens':>6} {heads}")
    results = {}
    for layout in args.layouts:
        results[layout] = measure(layout, args.rows, args.columns, args.tokens, peers, bandwidth)
        for count, row in results[layout]["tokens"].items():
            print(
                f"{layout:30} {results[layout]['bits_per_weight']:6.3f} {count:6d} {1e6 * row['seconds']:9.1f} "
                f"{1e6 * row['alone']:9.1f} "
                f"{row['bandwidth_share']:12.1%} {row['speed_over_bf16']:7.2f} {row['teraflops']:8.1f} "
                f"{row['relative_error']:8.1e}",
                flush=True,
            )
    if args.json:
        bf16 = {str(count): time for count, time in peers.items()}
        summary = {"device": device, "bandwidth_gb_s": bandwidth / 1e9, "bf16_seconds": bf16, "layouts": results}
        args.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
