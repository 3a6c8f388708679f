"""What programs that are timed turn by turn have in common: a prompt or a generation for each line of input."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from typing import Any


class Timed(ABC):
    """A loaded model."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all tokens."""

    @abstractmethod
    def process(self, first: int, count: int) -> None:
        """So many tokens behind those before, from a pattern that begins at `first`, and wait for the last's logits."""

    def prefill(self, count: int) -> float:
        """Seconds of a prompt from an empty cache."""
        self.clear()
        begun = time.perf_counter()
        self.process(0, count)
        return time.perf_counter() - begun

    def generate(self, context: int, count: int) -> float:
        """Seconds of so many tokens one by one, behind a prompt that is not timed."""
        self.prefill(context)
        begun = time.perf_counter()
        for i in range(count):
            self.process(i, 1)
        return time.perf_counter() - begun


def answer(model: Timed, job: dict[str, Any], report: dict[str, Any]) -> None:
    """Print the report as JSON, then the seconds of what each line of input asks for: "prompt" or "decode"."""
    print(json.dumps(report), flush=True)
    for line in sys.stdin:
        if line.strip() == "prompt":
            print(model.prefill(job["prompt"]), flush=True)
        else:
            print(model.generate(job["context"], job["generate"]), flush=True)
