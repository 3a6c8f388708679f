"""Speed and error of the PTQTP solver on a Gaussian matrix: native, PyTorch reference, and the bandwidth limit.

    python benchmarks/ptqtp_solver.py --threads 2 [--size 4096] [--repeats 5] [--json FILE]

A native run is the published loop to convergence on [size, size] float32, codes and scales written. The reference runs
in the same process, with the same number of threads, on `--reference-rows` rows. The limit is what reading the weights
alone would take at the copy bandwidth measured here. "One core" is the rate of one thread by processor
time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from featherweight.native import library
from featherweight.native.ptqtp import TritPlaneSettings, solve_trit_planes

CASES = {
    "K=1": TritPlaneSettings(planes=1),
    "K=2": TritPlaneSettings(),
    "K=3": TritPlaneSettings(planes=3),
    "K=2 tied": TritPlaneSettings(tied=True),
    "K=3 tied": TritPlaneSettings(planes=3, tied=True),
    "K=2 closing": TritPlaneSettings(closing=True),
    "K=2 two starts": TritPlaneSettings(starts=2),
}


def fastest(run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of `repeats` runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        begin = clock()
        run()
        times.append(clock() - begin)
    return min(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second read plus written by a copy of 256 MiB."""
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / fastest(lambda: target.copy_(source), repeats)


def measure(weight: Tensor, settings: TritPlaneSettings, threads: int, repeats: int, rows: int) -> dict[str, float]:
    part = weight[:rows]
    seconds = fastest(lambda: solve_trit_planes(weight, settings, threads, "native"), repeats)
    processor = fastest(lambda: solve_trit_planes(weight, settings, 1, "native"), repeats, time.process_time)
    reference = fastest(lambda: solve_trit_planes(part, settings, backend="reference"), 3)
    found = solve_trit_planes(weight, settings, threads, "native")
    error = float((weight - found.decode()).norm() / weight.to(torch.float64).norm())
    rate, reference_rate = weight.numel() / seconds, part.numel() / reference
    return {
        "seconds": seconds,
        "weights_per_second": rate,
        "weights_per_processor_second": weight.numel() / processor,
        "reference_weights_per_second": reference_rate,
        "ratio": rate / reference_rate,
        "relative_error": error,
        "iterations": found.iterations,
        "mean_steps": float(found.steps.double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference-rows", type=int, default=64)
    parser.add_argument("--isa", default="auto", help="auto, baseline, avx2 or avx512")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    native = library.get()
    if native is None:
        raise SystemExit("the native library is not available: build the package with a C++ compiler")
    native.select_isa(options.isa)
    torch.set_num_threads(options.threads)
    weight = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    bandwidth = copy_bandwidth(options.repeats)
    limit = bandwidth / weight.element_size()
    print(
        f"[{options.size}, {options.size}] float32 Gaussian, {options.threads} threads, {native.isa}, "
        f"torch {torch.__version__}"
    )
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s: reading alone would allow {limit / 1e6:.0f} M weights/s")
    print(
        f"{'':16}{'M weights/s':>12}{'one core':>10}{'reference':>11}{'ratio':>8}"
        f"{'of limit':>10}{'rel. error':>12}{'iterations':>12}"
    )
    results = {}
    for name, settings in CASES.items():
        result = measure(weight, settings, options.threads, options.repeats, options.reference_rows)
        results[name] = {**result, "fraction_of_limit": result["weights_per_second"] / limit}
        print(
            f"{name:16}{result['weights_per_second'] / 1e6:12.1f}"
            f"{result['weights_per_processor_second'] / 1e6:10.1f}{result['reference_weights_per_second'] / 1e6:11.2f}"
            f"{result['ratio']:8.0f}{results[name]['fraction_of_limit']:10.1%}{result['relative_error']:12.4f}"
            f"{result['iterations']:12.0f}",
            flush=True,
        )
    if options.json:
        setting = {"size": options.size, "threads": options.threads, "isa": native.isa, "machine": platform.processor()}
        report = {**setting, "copy_bytes_per_second": bandwidth, "limit_weights_per_second": limit, "cases": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
