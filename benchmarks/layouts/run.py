"""Layouts of ternary and nine-level weights at matrix-vector products: the library's, and those tried and not taken.

    python benchmarks/layouts/run.py --threads 2 --json bench-out/layouts.json
    python benchmarks/layouts/run.py --chosen        # only those that the library uses here

All kernels run in one session on matrices that together exceed the last-level cache, so that every byte comes from
memory. Bandwidth of only reading is measured before and after each round of the library's, and the share is the median
over rounds of a round's rate over the bandwidth around it (its quartiles are in the JSON); of the others the best round
counts, beside the best reading. What counts is weights a second: a layout with fewer bits has more of them at the same
bandwidth, unless unpacking costs more than the memory. The last column tells that cost: weights a second of one thread
on about a megabyte, which its own cache holds. If this, times the threads, is more than the memory gives, a layout can
be as fast as the memory.

layouts.cpp holds the kernels that were not taken, the library's are called through its operators, with quantising the
input and with their barriers. Two planes by table lookup share their tables and otherwise take twice the time of one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from synthetic_folder import Pool, planes, uniform

from featherweight.model.products import pack_code
from featherweight.model.products import structs as native
from featherweight.native.measure import read_bandwidth
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard

SOURCE = Path(__file__).resolve().parent / "layouts.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread")
ROWS, COLUMNS = 4096, 5120
CACHED_ROWS, CACHED_ROUNDS = 512, 2000


@dataclass(frozen=True)
class Row:
    """`bits` are those read, scales included; `share` that of the bandwidth measured beside it; `cached`: one thread on
    weights in its own cache; `quartiles` of the share."""

    layout: str
    by: str
    bits: float
    bytes_a_second: float
    weights_a_second: float
    share: float
    cached_weights_a_second: float
    quartiles: tuple[float, float] | None = None


def not_taken(options: argparse.Namespace, work: Path) -> list[Row]:
    """The kernels of layouts.cpp."""
    program = work / "layouts"
    subprocess.run([options.compiler, *FLAGS, str(SOURCE), "-o", str(program)], check=True)
    found = []
    for arguments in ((options.megabytes, options.threads, options.rounds), (1, 1, CACHED_ROUNDS)):
        done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            print(f"layouts.cpp is left out: {done.stderr.strip() or done.returncode}", file=sys.stderr)
            return []
        found.append([line.split(";") for line in done.stdout.splitlines()])
    bandwidth = float(found[0][0][2])
    return [
        Row(name, "layouts.cpp", float(bits), float(rate), float(weights), float(rate) / bandwidth, float(cached[3]))
        for (name, bits, rate, weights), cached in zip(found[0][1:], found[1][1:], strict=True)
    ]


def codes(pool: Pool, rows: int) -> dict[str, Code]:
    """What the library is asked to multiply by."""
    tied = planes(pool, (1.14, 0.76), 128, (3, 2))(rows, COLUMNS, 0)
    narrow = planes(pool, (1.14, 0.76), 32, (3, 2))(rows, COLUMNS, 0)
    assert isinstance(tied, Hadamard)
    assert isinstance(narrow, Hadamard)
    return {
        "one trit-plane, g128": planes(pool, (1.22,), 128)(rows, COLUMNS, 0),
        "two trit-planes, g128": planes(pool, (0.77, 0.50), 128)(rows, COLUMNS, 0),
        "two trit-planes tied 3:2, g128 (no rotation)": tied.inner,
        "two trit-planes tied 3:2, g32 (no rotation)": narrow.inner,
        "three trit-planes, g128": planes(pool, (0.9, 0.5, 0.25), 128)(rows, COLUMNS, 0),
        **{
            f"uniform {bits} bit, g128": uniform(pool, bits, step)(rows, COLUMNS, 0)
            for bits, step in ((2, 1.0), (3, 0.6), (4, 0.34), (5, 0.19), (6, 0.1), (8, 0.0315))
        },
        "bf16": Dense(torch.randn(rows, COLUMNS).bfloat16()),
    }


def products(memory: list[int], size: int, rows: int, threads: int) -> Callable[[], float]:
    """A function that multiplies a vector by every operand in turn, and returns the seconds it took."""
    library, precision = native.needed(), native.PRECISIONS["int8"]
    x, out = torch.randn(1, COLUMNS), torch.empty(1, rows)

    def once() -> float:
        begun = time.perf_counter()
        for address in memory:
            status = library.product(
                address, size, x.data_ptr(), COLUMNS, 1, COLUMNS, out.data_ptr(), rows, rows, precision, 0, threads
            )
            native.check(status, "a product")
        return time.perf_counter() - begun

    once()
    return once


def taken(options: argparse.Namespace) -> list[Row]:
    """The library's layouts, each that a code can have; "auto" marks the one it chooses."""
    rows = []
    small = codes(Pool(0), CACHED_ROWS)
    for title, code in codes(Pool(0), ROWS).items():
        chosen = pack_code(code).layouts[0]
        for layout in native.LAYOUTS:
            if layout == "auto":
                continue
            try:
                operand = pack_code(code, layout=layout, threads=options.threads).operands[0]
            except ValueError:  # not one of this code's
                continue
            if options.chosen and operand.layout != chosen:
                continue
            mark = " (chosen)" if operand.layout == chosen else ""
            cached = pack_code(small[title], layout=layout).operands[0]
            rows.append(measured(f"{title}: {operand.layout}{mark}", operand, cached, options))
    return rows


def measured(title: str, operand: native.Operand, cached: native.Operand, options: argparse.Namespace) -> Row:
    size = operand.memory.numel()
    stride = -(-size // native.ALIGNMENT) * native.ALIGNMENT
    count = max(1, (options.megabytes << 20) // stride)
    memory = native.aligned(count * stride)
    for i in range(count):
        ctypes.memmove(memory.data_ptr() + i * stride, operand.memory.data_ptr(), size)
    addresses = [memory.data_ptr() + i * stride for i in range(count)]
    run, rates, shares = products(addresses, size, ROWS, options.threads), [], []
    before = _bandwidth(options)
    for _ in range(options.rounds):
        rates.append(count / run())
        after = _bandwidth(options)
        shares.append(rates[-1] * operand.weight_bytes * 2 / (before + after))
        before = after
    del memory
    once = products([cached.memory.data_ptr()], cached.memory.numel(), CACHED_ROWS, 1)
    in_cache = min(once() for _ in range(CACHED_ROUNDS))
    rate = statistics.median(rates)  # products a second
    low, share, high = statistics.quantiles(shares, n=4, method="inclusive")
    bits = 8 * operand.weight_bytes / (ROWS * COLUMNS)
    return Row(
        title, "library", bits, rate * operand.weight_bytes, rate * ROWS * COLUMNS, share,
        CACHED_ROWS * COLUMNS / in_cache, (low, high),
    )  # fmt: skip


def _bandwidth(options: argparse.Namespace) -> float:
    """Bytes a second, of a single pass: the same conditions as a round of products."""
    return read_bandwidth(options.megabytes << 20, 1, options.threads) or float("nan")


def table(rows: list[Row]) -> str:
    lines = [
        "| layout | by | bits | GB/s | share of bandwidth | 10^9 weights/s | in cache, one thread |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.layout} | {row.by} | {row.bits:.3f} | {row.bytes_a_second / 1e9:.1f} | {100 * row.share:.0f} % "
        f"| {row.weights_a_second / 1e9:.1f} | {row.cached_weights_a_second / 1e9:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def at_least_two(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError("two or more are needed for quartiles")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=at_least_two, default=9)
    parser.add_argument("--chosen", action="store_true", help="only the layouts that the library uses here")
    parser.add_argument("--megabytes", type=int, default=1536, help="of weights; more than the last-level cache")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = taken(options)
    if not options.chosen:
        with tempfile.TemporaryDirectory() as work:
            rows += not_taken(options, Path(work))
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        values: list[dict[str, Any]] = [asdict(row) for row in rows]
        options.json.write_text(json.dumps({"threads": options.threads, "rows": values}, indent=2) + "\n")


if __name__ == "__main__":
    main()
