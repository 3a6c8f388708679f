"""A device's memory for tests: so many windows fit at a time, and it may run out once at a chosen moment."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Memory:
    """`hold(windows)` raises torch.OutOfMemoryError where more are held than `limit`, or at call `fails_at`."""

    limit: int | None = None
    fails_at: int | None = None
    calls: int = 0
    failed: bool = False
    held: list[int] = field(default_factory=list)

    def hold(self, windows: int) -> None:
        self.calls += 1
        once = self.fails_at is not None and self.calls >= self.fails_at and windows > 1 and not self.failed
        if once or (self.limit is not None and windows > self.limit):
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.held.append(windows)
