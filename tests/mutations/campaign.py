"""Runs many cases, in processes that may die, and adds up what came out."""

from __future__ import annotations

import collections
import gc
import json
import os
import re
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mutations.bases import BASES, Base, build, quiet
from mutations.files import Files
from mutations.judge import judge
from mutations.kinds import Case, all_kinds, draw

BATCH = 100
LONGEST = 90.0  # seconds for one case
MEMORY = 12 << 30  # bytes of address space for one process
COUNTED = {"traceback": "tracebacks", "engines differ": "differences", "texts differ": "differences"}


@dataclass
class Result:
    """One case. faults: (rule, words); status: of `load`."""

    number: int
    base: str
    steps: list[tuple[str, str]]
    status: str
    faults: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def describe(self) -> str:
        return f"{self.number} {self.base}: " + "; ".join(f"{kind}: {words}" for kind, words in self.steps)


def bases_in(work: Path, names: Iterable[str] = ()) -> list[tuple[Base, Files]]:
    """Build the bases, or find them in `work`."""
    wanted = set(names)
    work.mkdir(parents=True, exist_ok=True)
    with quiet():
        return [(base, build(base, work)) for base in BASES if not wanted or base.name in wanted]


def run_case(number: int, bases: Sequence[tuple[Base, Files]], work: Path, told: Any = lambda step: None) -> Result:
    """One case in this process."""
    case, files = draw(number, bases)
    original = next(found for base, found in bases if base is case.base)
    return judged(case, files, work, told, original)


def judged(
    case: Case, files: Files, work: Path, told: Any = lambda step: None, original: Files | None = None
) -> Result:
    """The verdict about a mutant."""
    begun = time.perf_counter()
    folder = work / f"case-{os.getpid()}"
    files.write(folder)
    torch.manual_seed(abs(case.number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = judge(case, folder, told, original)
    texts = {
        step: f"{outcome.error}: {outcome.text}".replace(str(folder), "FOLDER")
        for step, outcome in verdict.outcomes.items()
        if not outcome.ok
    }
    seconds = time.perf_counter() - begun
    result = (
        case.number,
        case.base.name,
        list(case.steps),
        verdict.outcomes["load"].status,
        verdict.faults,
        verdict.notes,
    )
    return Result(*result, texts, seconds)


def run_many(
    numbers: Sequence[int],
    bases: Sequence[tuple[Base, Files]],
    work: Path,
    notify: Any = lambda result: None,
    warm: bool = True,
) -> list[Result]:
    """All cases, in child processes one after the other; one that dies or hangs is a fault of its case.

    `warm` runs the bases as they are before, in this process: children then find everything imported. What is wrong
    with one of them is a fault of a case of number -1.
    """
    all_kinds()
    results = _warm(bases, work) if warm else []
    left = list(numbers)
    while left:
        done, fault = _batch(left[:BATCH], bases, work, notify)
        results += done
        left = left[len(done) :]
        if fault is not None:
            case, _ = draw(left[0], bases)
            rule, words = fault
            theirs = rule.startswith("transformers alone")
            found = ([], [f"{rule}: {words}"]) if theirs else ([fault], [])
            results.append(Result(left[0], case.base.name, list(case.steps), "failed", *found))
            notify(results[-1])
            left = left[1:]
    return results


def _warm(bases: Sequence[tuple[Base, Files]], work: Path) -> list[Result]:
    results = []
    for base, files in bases:
        with quiet():
            result = judged(Case(-1, base, ()), files, work)
        if result.faults or result.status != "ok":
            results.append(result)
    return results


def _batch(
    numbers: Sequence[int], bases: Sequence[tuple[Base, Files]], work: Path, notify: Any
) -> tuple[list[Result], tuple[str, str] | None]:
    """Results of a child, and (rule, words) where it ended before its time."""
    out, into = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(out)
        _child(numbers, bases, work, into)
    os.close(into)
    results: list[Result] = []
    step, rest, hung = "start", b"", False
    while True:
        if not select.select([out], [], [], LONGEST)[0]:
            os.kill(child, signal.SIGKILL)
            hung = True
        piece = os.read(out, 1 << 16)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                results.append(Result(**json.loads(line)))
                notify(results[-1])
            else:
                step = line.decode()
    os.close(out)
    _, status = os.waitpid(child, 0)
    if len(results) == len(numbers):
        return results, None
    if hung:
        return results, ("transformers alone hangs" if step == "transformers" else "hang", step)
    code = os.waitstatus_to_exitcode(status)
    words = f"{step}: signal {signal.Signals(-code).name}" if code < 0 else f"{step}: exit {code}"
    return results, ("transformers alone crashes" if step == "transformers" else "crash", words)


def _child(numbers: Sequence[int], bases: Sequence[tuple[Base, Files]], work: Path, into: int) -> None:
    try:
        gc.freeze()  # what is imported is not walked again and again
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        torch.set_num_threads(1)
        for number in numbers:
            result = run_case(number, bases, work, lambda step: os.write(into, f"{step}\n".encode()))
            os.write(into, json.dumps(result.__dict__).encode() + b"\n")
    except BaseException:
        import traceback

        os.write(into, f"the judge itself: {traceback.format_exc()[-1500:]!r}\n".encode())
        raise
    finally:
        os._exit(0)


def table(results: Sequence[Result]) -> list[tuple[str, int, int, int, int, int, int]]:
    """Kind, tries, loaded, refused, tracebacks, differences, other faults; a case of two kinds counts for both."""
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        for name in {kind for kind, _ in result.steps} | {"all"}:
            row = rows[name]
            row["tries"] += 1
            row["loaded" if result.status == "ok" else "refused" if result.status == "refused" else "neither"] += 1
            row.update({COUNTED.get(rule, "others") for rule, _ in result.faults})
    columns = ("tries", "loaded", "refused", "tracebacks", "differences", "others")
    ordered = sorted(rows, key=lambda name: (name == "all", name))
    return [(name, *(rows[name][column] for column in columns)) for name in ordered]  # type: ignore[misc]


def clusters(results: Sequence[Result]) -> list[tuple[int, str, str, list[Result]]]:
    """Faults that read alike apart from names and numbers: (count, rule, words, cases), the most frequent first."""
    found: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    for result in results:
        for rule, words in result.faults:
            found[rule, alike(words)].append(result)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(len(cases), rule, words, cases) for (rule, words), cases in ordered]


def alike(words: str) -> str:
    """Words without what differs from case to case."""
    words = re.sub(r"/\S*case-\d+", "FOLDER", words)
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\b[\w.]*(?:layers|embed|lm_head|wte|norm)[\w.]*", "*", words)
    return re.sub(r"[-+]?\d[\d.e+-]*|inf|nan", "#", words)[:160]
