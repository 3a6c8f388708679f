"""Programs that take turns: each stays loaded in a process of its own and is asked for one short run after the other.

On a machine that shares its memory with others the bandwidth moves by half within minutes. Runs that are compared
therefore lie within a second or two of each other, bandwidth is measured between them, and what counts is the median
of the ratios of neighbours.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST_WAIT = 900.0  # seconds for one answer
PEERS = Path(__file__).resolve().parent / "peers"


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


def why(code: int, errors: str) -> str:
    """What ended a process."""
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return (errors.strip().splitlines() or [f"ended with {code}"])[-1]


class Failure(Exception):
    """A program that ended or did not answer."""


class Server:
    """A program of benchmarks/peers that has a model loaded and answers requests."""

    def __init__(self, python: Path, script: str, job: dict[str, Any], environment: dict[str, str]) -> None:
        self._files = tempfile.TemporaryDirectory()
        work = Path(self._files.name)
        (work / "job.json").write_text(json.dumps(job))
        self._errors = work / "errors.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(PEERS / script), str(work / "job.json")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            )  # fmt: skip
        self._unread = b""

    def read(self) -> str:
        """The next line of output."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_WAIT)
            if not ready:
                raise Failure(f"took more than {LONGEST_WAIT:.0f} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Failure(why(self._process.wait(), self._errors.read_text()))
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def ask(self, request: str) -> list[float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Failure(why(self._process.wait(), self._errors.read_text())) from error
        return [float(word) for word in self.read().split()]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._files.cleanup()


@dataclass
class Turn:
    """One answer: when it was given, and the bandwidth just before and after it."""

    heat: int
    round: int
    request: str
    seconds: float
    outside: float | None  # of these seconds, those outside products and attention
    bandwidth: float  # bytes a second, mean of the two


@dataclass
class Contestant:
    """One model of one program, and its turns."""

    name: str
    tool: str
    title: str
    path: Path
    open: Callable[[], Server]
    about: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    failure: str | None = None

    def seconds(self, request: str, heat: int | None = None) -> dict[tuple[int, int], float]:
        """By heat and round."""
        return {
            (t.heat, t.round): t.seconds for t in self.turns if t.request == request and heat in (None, t.heat)
        }  # fmt: skip

    def median(self, request: str, units: int) -> float | None:
        """Units a second."""
        found = list(self.seconds(request).values())
        return units / statistics.median(found) if found else None


def run_heat(
    number: int,
    contestants: Sequence[Contestant],
    rounds: int,
    prompts: int,
    bandwidth: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """Load all, then let each in turn decode, in the first rounds process a prompt too; every other round backwards."""
    servers: dict[int, Server] = {}
    try:
        for place, contestant in enumerate(contestants):
            if contestant.failure is None:
                servers[place] = contestant.open()
                _guarded(contestant, lambda c=contestant, s=servers[place]: c.about.update(json.loads(s.read())))
        for turn in range(rounds):
            order = [place for place in servers if contestants[place].failure is None]
            for request in ["decode", *["prompt"] * (turn < prompts)]:
                before = bandwidth()
                for place in order if turn % 2 == 0 else order[::-1]:
                    contestant, server = contestants[place], servers[place]
                    found = _guarded(contestant, lambda s=server, r=request: s.ask(r))
                    after = bandwidth()
                    if found is not None:
                        outside = found[1] if len(found) > 1 else None
                        contestant.turns.append(Turn(number, turn, request, found[0], outside, (before + after) / 2))
                    before = after
        say(f"heat {number + 1}: " + ", ".join(c.failure or _told(c, number) for c in contestants))
    finally:
        for server in servers.values():
            server.close()


def _guarded(contestant: Contestant, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Failure as failure:
        contestant.failure = str(failure)
        print(f"{contestant.tool} {contestant.name}: {failure}", file=sys.stderr, flush=True)
        return None


def _told(contestant: Contestant, heat: int) -> str:
    found = contestant.seconds("decode", heat).values()
    return f"{contestant.name} {statistics.median(found):.3f} s" if found else f"{contestant.name} no turn"


def ratios(fast: Contestant, slow: Contestant, request: str) -> list[float]:
    """How many times faster the first was, in each round that both took part in."""
    ours, theirs = fast.seconds(request), slow.seconds(request)
    return [theirs[key] / ours[key] for key in ours if key in theirs]
