"""Our Hessian sweep against llm-compressor's GPTQ on one layer, in the same run on the same machine.

    python benchmarks/sweep_vs_peer.py --threads 2 [--size 4096] [--bits 4] [--group 128] [--json FILE]

Both are given the same weight [size, size] float32 and the same Hessian (mean of x x^T over 8192 correlated random
tokens) and do the same work: min-max scales of every group, damping of 1 % of the mean diagonal, factorisation, sweep.
They take turns, each in a process of its own with the same number of threads, and the fastest of the turns counts;
processor time is shown too, which other work on the machine disturbs less. The relative output error
tr(E H E^T) / tr(W H W^T), E = W - What, shows that both did it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PEER = Path(__file__).resolve().parent / "peers" / "time_gptq.py"
TOKENS = 8192


def make_layer(size: int, seed: int) -> dict[str, Tensor]:
    """`weight` and `hessian`, float32 [size, size]: Gaussian weights; inputs with a few strong common directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator) * 0.02
    common = torch.randn(size // 8, size, generator=generator) / (size // 8) ** 0.5
    channel = torch.exp(0.5 * torch.randn(size, generator=generator))
    hessian = torch.zeros(size, size)
    for _ in range(TOKENS // 1024):
        own = torch.randn(1024, size, generator=generator)
        inputs = (own + 2 * torch.randn(1024, size // 8, generator=generator) @ common) * channel
        hessian.addmm_(inputs.T, inputs, alpha=1 / TOKENS)
    return {"weight": weight, "hessian": hessian}


def output_error(tensors: dict[str, Tensor], found: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    weight, hessian = tensors["weight"], tensors["hessian"]
    error = weight - found
    return float(((error @ hessian) * error).double().sum() / ((weight @ hessian) * weight).double().sum())


def our_sweep(weight: Tensor, hessian: Tensor, job: dict[str, Any]) -> tuple[Tensor, float, float]:
    """OURS: dequantised float32 [out, in], seconds and processor seconds. The one place that calls featherweight.

    Static groups, as llm-compressor's: ranges of the weights as they are, whatever the order of the columns.
    """
    from featherweight.methods.quantize.base import SolveOptions
    from featherweight.methods.quantize.grids.uniform import UniformGrid
    from featherweight.methods.quantize.sweep import SweepSettings, sweep

    grid = UniformGrid(bits=job["bits"], group_size=job["group"], symmetric=job["symmetric"])
    settings = SweepSettings(groups="static", order="activation" if job["actorder"] else "none")
    begun, worked = time.perf_counter(), time.process_time()
    found = sweep(weight, {"gram": hessian}, grid, settings, SolveOptions(threads=job["threads"]))
    seconds, processor = time.perf_counter() - begun, time.process_time() - worked
    if found.data_free:
        raise SystemExit(found.note)
    return found.code.decode(), seconds, processor


def our_turn(path: Path) -> None:
    """What the child process of ours does."""
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    tensors = load_file(job["tensors"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        found, seconds, processor = our_sweep(tensors["weight"], tensors["hessian"], job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    save_file({"weight": found.contiguous()}, job["out"])
    print(json.dumps({"seconds": seconds, "processor_seconds": processor, "extra_memory_bytes": peak * 1024}))


def turn(command: list[str], path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One process: what it printed last, as JSON, with its output error."""
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    job = json.loads(path.read_text())
    return {**result, "error": output_error(load_file(job["tensors"]), load_file(job["out"])["weight"])}


def compare(options: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Every turn of both, by name."""
    save_file(make_layer(options.size, options.seed), work / "layer.safetensors")
    job = {
        "tensors": str(work / "layer.safetensors"),
        "out": str(work / "found.safetensors"),
        "bits": options.bits,
        "group": options.group,
        "symmetric": not options.asymmetric,
        "actorder": "static" if options.act_order else None,
        "threads": options.threads,
    }
    (work / "job.json").write_text(json.dumps(job))
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    commands = {
        "featherweight": ([sys.executable, __file__, "--turn"], dict(os.environ)),
        "llm-compressor": ([str(options.peers_python), str(PEER)], {**plain, "HF_HUB_OFFLINE": "1"}),
    }
    if options.only:
        commands = {options.only: commands[options.only]}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, (command, environment) in commands.items():
            turns[name].append(turn(command, work / "job.json", environment))
            print(f"{name}: {turns[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true", help="columns by falling Hessian diagonal (static groups)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("featherweight", "llm-compressor"))
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn is not None:
        our_turn(options.turn)
        return
    if options.only != "featherweight" and not options.peers_python.is_file():
        raise SystemExit(
            f"there is no {options.peers_python}: make it with `quality_vs_peers.py --setup`, or name the peers' "
            "Python with --peers-python"
        )
    with tempfile.TemporaryDirectory() as work:
        turns = compare(options, Path(work))
    best = {name: min(results, key=lambda result: result["seconds"]) for name, results in turns.items()}
    print(f"[{options.size}, {options.size}], {options.bits} bit g{options.group}, {options.threads} threads")
    for name, result in best.items():
        print(
            f"{name:16}{result['seconds']:8.2f} s, {result['processor_seconds']:8.2f} s of processor time, "
            f"relative output error {result['error']:.6f}"
        )
    if len(best) == 2:
        ratios = [best["llm-compressor"][key] / best["featherweight"][key] for key in ("seconds", "processor_seconds")]
        print(
            f"featherweight is {ratios[0]:.2f} times as fast as llm-compressor's GPTQ "
            f"({ratios[1]:.2f} times by processor time)"
        )
    if options.json:
        setting = {
            key: getattr(options, key) for key in ("size", "bits", "group", "threads", "asymmetric", "act_order")
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**setting, "best": best, "turns": turns}, indent=2) + "\n")


if __name__ == "__main__":
    main()
