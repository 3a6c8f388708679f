#!/usr/bin/env python
"""Time and memory of `feather export --to gguf` where codes are taken over, beside `cp` of the file that it makes.

    python benchmarks/export_gguf.py --shape 1.1b --variant uniform-4 planes-1 --repeats 3

Folders are synthetic (benchmarks/synthetic_folder.py) and kept in --work. Exports and copies take turns, each in a
process of its own and with the disk waited for; the median of the ratios is what counts where other work runs beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from synthetic_folder import VARIANTS, write_folder

ROOT = Path(__file__).resolve().parent.parent
EXPORT = (
    "import sys, time, featherweight, torch\n"
    "from featherweight.interop.exporting import export\n"
    "from featherweight.registry import registered\n"
    "registered('exporter'); torch.set_num_threads(int(sys.argv[3]))\n"
    "begun, own = time.perf_counter(), time.process_time()\n"
    "made = export(sys.argv[1], 'gguf', sys.argv[2])\n"
    "print(time.perf_counter() - begun, time.process_time() - own, *sorted({v.becomes for v in made.verdicts}))\n"
)


def run(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and output of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    assert process.stdout is not None
    text = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024, text


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = write_folder(arguments.work / f"{variant}-{arguments.shape}", arguments.shape, variant)
    out, copy = arguments.work / "out.gguf", arguments.work / "copy.gguf"
    rows = []
    for _ in range(arguments.repeats):
        for path in (out, copy):
            path.unlink(missing_ok=True)
        _, memory, text = run([sys.executable, "-c", EXPORT, str(folder), str(out), str(arguments.threads)])
        seconds, own, *types = text.split()
        begun = time.perf_counter()
        subprocess.run(["sh", "-c", f"cp '{out}' '{copy}' && sync '{copy}'"], check=True)
        copied = time.perf_counter() - begun
        rows.append({"seconds": float(seconds), "cpu": float(own), "cp": copied, "memory": memory, "types": types})
    size = out.stat().st_size
    for path in (out, copy):
        path.unlink()
    return {
        "variant": variant,
        "bytes": size,
        "seconds": statistics.median(row["seconds"] for row in rows),
        "cpu_seconds": statistics.median(row["cpu"] for row in rows),
        "cp_seconds": statistics.median(row["cp"] for row in rows),
        "ratio": statistics.median(row["seconds"] / row["cp"] for row in rows),
        "memory_bytes": max(row["memory"] for row in rows),
        "types": rows[0]["types"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", help="a shape of scripts/make_synthetic.py")
    parser.add_argument("--variant", nargs="+", default=["uniform-4", "planes-1"], choices=sorted(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = [measure(variant, arguments) for variant in arguments.variant]
    for row in found:
        print(
            f"{row['variant']}: {row['bytes'] / 1e6:.0f} MB as {', '.join(row['types'])} in {row['seconds']:.2f} s "
            f"({row['cpu_seconds']:.2f} s of a processor), cp {row['cp_seconds']:.2f} s, ratio {row['ratio']:.2f}, "
            f"peak {row['memory_bytes'] / 1e6:.0f} MB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
