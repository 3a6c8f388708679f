"""What waiting in a loop costs: PyTorch's threads with each wait policy, on an idle and on a busy machine.

libgomp's threads wait in a loop for their next piece of work. If another process needs the processors, whoever is
waited for does not get one, and the others keep it from getting one by waiting. This times the same work in fresh
processes, policies in turn, with and without as many processes of pure computing as there are threads beside it, and
prints medians of ratios to libgomp's default.

    python benchmarks/wait_policy.py --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10000 spins": {"GOMP_SPINCOUNT": "10000"},
}
WORKS = ("training", "many small")


def work(name: str, threads: int) -> dict[str, float]:
    """Seconds, and processor seconds, of a fixed amount of work."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name == "training":  # of a small network, forwards and backwards: regions of a fraction of a millisecond
        layers = [torch.nn.Linear(512, 512) for _ in range(4)]
        network = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.SiLU())])
        x = torch.randn(256, 512)

        def step() -> None:
            network(x).square().mean().backward()

        steps = 20
    else:  # element by element on what fits the cache: the regions are as short as they get
        values = torch.randn(200_000)

        def step() -> None:
            for _ in range(50):
                values.mul_(0.999).add_(1e-3)

        steps = 20
    step()
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": time.perf_counter() - begun, "cpu": cpu}


def timed(name: str, policy: str, threads: int) -> dict[str, float]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--work", name, "--threads", str(threads)]
    done = subprocess.run(command, env=kept | POLICIES[policy], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def rivals(count: int) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]


def compare(name: str, threads: int, rounds: int) -> dict[str, Any]:
    ratios: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    seconds = []
    for number in range(rounds):
        order = list(POLICIES) if number % 2 else list(POLICIES)[::-1]
        found = {policy: timed(name, policy, threads) for policy in order}
        base = found["default"]
        seconds.append(base["seconds"])
        for policy, one in found.items():
            ratios[policy].append((one["seconds"] / base["seconds"], one["cpu"] / base["cpu"]))
    medians = {
        policy: [round(statistics.median(pair[i] for pair in pairs), 2) for i in range(2)]
        for policy, pairs in ratios.items()
    }
    return {"default_seconds": round(statistics.median(seconds), 3), "ratios": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work, options.threads)))
        return
    report: dict[str, Any] = {"threads": options.threads, "load": os.getloadavg()[0]}
    print(
        f"{'work':<12} {'machine':<8} " + " ".join(f"{policy:>16}" for policy in POLICIES) + "   (time, processor time)"
    )
    for name in WORKS:
        for busy in (False, True):
            others = rivals(options.threads if busy else 0)
            try:
                found = compare(name, options.threads, options.rounds)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            cells = [f"{time_ratio:6.2f} {cpu_ratio:6.2f}" for time_ratio, cpu_ratio in found["ratios"].values()]
            print(
                f"{name:<12} {'busy' if busy else 'as it is':<8} " + " ".join(f"{cell:>16}" for cell in cells),
                flush=True,
            )
            report[f"{name}, {'busy' if busy else 'as it is'}"] = found
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
