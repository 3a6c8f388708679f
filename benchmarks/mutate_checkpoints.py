#!/usr/bin/env python
"""Mutate small checkpoints in thousands of ways: each must load as the model it describes or be refused in a sentence.

    python benchmarks/mutate_checkpoints.py --count 10000 --report bench-out/mutations.json
    python benchmarks/mutate_checkpoints.py --only 4711            # one case again, with all that was said

A case is a number: it draws one of the bases (tests/mutations/bases.py) and one or two mutations of it. The rules are
in tests/mutations/judge.py: one sentence or success; both engines say the same, logits compared; nothing is refused
that transformers loads rightly, nothing loaded that it fills with random numbers; loading twice gives one model; plan
agrees with load; damaged bytes under a hash are found. Cases run in child processes, so a crash is found and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "FEATHERWEIGHT_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mutations.campaign import Result, bases_in, clusters, run_case, run_many, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", type=int, help="run this case alone, in this process, and tell all about it")
    parser.add_argument("--base", action="append", default=[], help="name of a base; others are left out")
    parser.add_argument("--report", type=Path, help="JSON file with every fault's case")
    parser.add_argument("--work", type=Path, help="folder for bases and cases, kept; memory-backed ones are fastest")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        work = arguments.work or Path(temporary)
        bases = bases_in(work / "bases", arguments.base)
        if arguments.only is not None:
            explain(run_case(arguments.only, bases, work))
            return
        begun = time.perf_counter()
        progress = Progress(arguments.count)
        results = run_many(range(arguments.seed, arguments.seed + arguments.count), bases, work, progress.notify)
        seconds = time.perf_counter() - begun
    show(results)
    used = os.times().children_user + os.times().children_system
    print(f"{len(results)} cases in {seconds:.0f} s ({used:.0f} s of CPU), {len(results) / used:.1f} a second of CPU")
    if arguments.report:
        arguments.report.absolute().parent.mkdir(parents=True, exist_ok=True)
        arguments.report.write_text(json.dumps(report(results, seconds), indent=1))
    sys.exit(any(result.faults for result in results))


class Progress:
    """A line for every tenth, and for each fault."""

    def __init__(self, count: int) -> None:
        self.count, self.done, self.faulty = count, 0, 0

    def notify(self, result: Result) -> None:
        self.done += 1
        self.faulty += bool(result.faults)
        for rule, words in result.faults:
            print(f"{result.describe()[:200]}\n    {rule}: {words[:200]}", file=sys.stderr, flush=True)
        if self.done * 10 // self.count > (self.done - 1) * 10 // self.count:
            print(f"{self.done} of {self.count} cases, {self.faulty} with faults", file=sys.stderr, flush=True)


def explain(result: Result) -> None:
    print(result.describe())
    print(f"load: {result.status}")
    for step, text in result.texts.items():
        print(f"  {step}: {text}")
    for note in result.notes:
        print(f"  note: {note}")
    for rule, words in result.faults:
        print(f"  FAULT {rule}: {words}")


def show(results: list[Result]) -> None:
    columns = ("tries", "loaded", "refused", "tracebacks", "differences", "other faults")
    print(f"{'kind of mutation':52}" + "".join(f"{column:>13}" for column in columns))
    for name, *numbers in table(results):
        print(f"{name:52}" + "".join(f"{number:13}" for number in numbers))
    found = clusters(results)
    if found:
        print("\nfaults, those alike together:")
    for count, rule, words, cases in found:
        print(f"{count:5}  {rule}: {words}\n       e.g. {cases[0].describe()[:200]}")


def report(results: list[Result], seconds: float) -> dict[str, Any]:
    return {
        "cases": len(results),
        "seconds": seconds,
        "table": table(results),
        "faults": [result.__dict__ for result in results if result.faults],
        "notes": [(result.number, result.notes) for result in results if result.notes],
        "texts": sorted({text for result in results for text in result.texts.values()}),
    }


if __name__ == "__main__":
    main()
