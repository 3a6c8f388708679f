#!/usr/bin/env python
"""Compress a synthetic checkpoint of a given shape: seconds (disk included), peak resident memory, rates.

    python benchmarks/compress_synthetic.py --shape 1.1b --recipe ptqtp --threads 2

The checkpoint (random Gaussian weights, bf16, sharded) is made first by scripts/make_synthetic.py and kept in --work;
its pages are dropped from the system's cache, so that reading it counts. Beside the time stand two limits measured in
the same run: reading the checkpoint from the disk, and copying its bytes in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 16 << 20


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    begun = time.perf_counter()
    buffer = bytearray(WINDOW)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begun


def copy_rate() -> float:
    """Bytes a second of one thread copying memory, read and written counted once."""
    source = bytearray(512 << 20)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        bytes(source)
        best = min(best, time.perf_counter() - begun)
    return len(source) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", help="1.1b, 3b, 7b or tiny")
    parser.add_argument("--recipe", default="ptqtp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out")
    parser.add_argument("--max-memory", default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    source = arguments.work / f"synthetic-{arguments.shape}"
    if not (source / "config.json").exists():
        make = [
            sys.executable,
            str(ROOT / "scripts" / "make_synthetic.py"),
            "--shape",
            arguments.shape,
            "--out",
            str(source),
        ]
        subprocess.run(make, check=True)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    drop_cache(source)
    reading = read_seconds(source)
    drop_cache(source)
    out = arguments.work / f"{source.name}-{arguments.recipe}"
    shutil.rmtree(out, ignore_errors=True)
    result_file = arguments.work / "result.json"
    command = [sys.executable, "-m", "featherweight.cli.main", "compress", str(source), "--recipe", arguments.recipe]
    command += ["--out", str(out), "--threads", str(arguments.threads), "--json", str(result_file)]
    command += ["--max-memory", arguments.max_memory] if arguments.max_memory else []
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    result = json.loads(result_file.read_text())
    report = {
        "shape": arguments.shape,
        "recipe": arguments.recipe,
        "threads": arguments.threads,
        "weights": result["weights"],
        "wall_seconds": wall,
        "compress_seconds": result["seconds"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "weights_per_second": result["weights"] / wall,
        "bits_per_weight": result["bits_per_weight"],
        "source_bytes": size,
        "output_bytes": result["bytes"],
        "read_seconds": reading,
        "copy_seconds": size / copy_rate(),
    }
    for name, value in report.items():
        print(f"{name:22} {value:,.3f}" if isinstance(value, float) else f"{name:22} {value}")
    print(f"{'ratio to disk limit':22} {wall / reading:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
