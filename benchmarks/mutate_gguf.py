#!/usr/bin/env python
"""Damage a small GGUF file in thousands of ways: each must be read as the model it describes, or refused in a sentence.

    python benchmarks/mutate_gguf.py --count 10000

A case is a number (tests/interop/gguf_damage.py): one to four mutations of header, metadata, names and weights. Every
tensor of what is opened is read, too. Cases run in child processes, so a crash, a hang and memory that a number in the
file asks for are found as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for name in ("OMP_NUM_THREADS", "FEATHERWEIGHT_THREADS"):
    os.environ.setdefault(name, "1")
TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "interop")]

import gguf  # noqa: E402
from gguf_damage import Outcome, damaged  # noqa: E402
from written_gguf import write_model  # noqa: E402

from models import FAMILIES  # noqa: E402

MOST_MEMORY = 4 << 30
MOST_SECONDS = 60


def write_base(path: Path) -> bytes:
    """A model with a tensor of every type that the package writes."""
    import transformers

    config, model, common = FAMILIES["llama"]
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    made = getattr(transformers, model)(getattr(transformers, config)(**(common | wide)))
    kinds = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "F16", "BF16", "F32", "MXFP4"]
    names = iter(kinds * 9)
    write_model(made, path, lambda name: gguf.GGMLQuantizationType[next(names)])
    return path.read_bytes()


def run(numbers: list[int], base: bytes, folder: Path) -> list[Outcome]:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    return [damaged(base, number, folder / f"{os.getpid()}.gguf") for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=50, help="cases a child process does at a time")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    begun, lost = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="mutate-gguf-") as temporary:
        folder = Path(temporary)
        base = write_base(folder / "base.gguf")
        with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
            last = arguments.seed + arguments.count
            chunks = [
                list(range(first, min(last, first + arguments.chunk)))
                for first in range(arguments.seed, last, arguments.chunk)
            ]
            results = [(chunk, pool.apply_async(run, (chunk, base, folder))) for chunk in chunks]
            for chunk, result in results:
                try:
                    outcomes += result.get(MOST_SECONDS * len(chunk) / 10)
                except multiprocessing.TimeoutError:  # it hangs, or has died
                    lost.append(chunk)
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults:
        print(f"case {outcome.number} ({outcome.done}): {outcome.fault}: {outcome.text[:200]}")
    for chunk in lost:
        print(f"cases {chunk[0]} to {chunk[-1]}: no answer")
    said = Counter(" ".join(outcome.text.split(": ", 1)[-1].split()[:4]) for outcome in outcomes if outcome.refused)
    for words, count in said.most_common(25):
        print(f"{count:6}  {words} ...")
    refused = sum(outcome.refused for outcome in outcomes)
    seconds = time.perf_counter() - begun
    print(f"{len(outcomes)} cases, {refused} refused, {len(faults)} faults, {len(lost)} chunks lost, {seconds:.0f} s")
    sys.exit(bool(faults or lost))


if __name__ == "__main__":
    main()
