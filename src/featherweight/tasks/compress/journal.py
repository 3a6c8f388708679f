"""Which layers are done, and the event that tells of each."""

from __future__ import annotations

import time
from typing import Any

from featherweight.events import Observer
from featherweight.system.memory import peak_memory_bytes
from featherweight.tasks.compress.pace import Pace
from featherweight.tasks.compress.plan import Plan


class Journal:
    """Records of finished layers by their number in the plan; every new one is an event with rate and time left.

    In a calibrated run the time goes by the layers inside the blocks, which wait for the network's passes: an embedding
    that is rounded in a second says nothing about them, so nothing is foretold until the first of them is done, and
    what came before the blocks (`begin_blocks`) does not count against them.
    """

    def __init__(self, plan: Plan, notify: Observer) -> None:
        self.plan, self.notify = plan, notify
        self.records: dict[int, dict[str, Any]] = {}
        self.resumed = 0
        self._worked = 0
        quick = plan.outside if plan.recipe.calibrated else ()
        self._quick = {job.layer.name for job in quick}
        self._left = plan.weights - sum(job.layer.parameters for job in quick)
        self._started = self._last = time.monotonic()
        self._pace = Pace() if plan.recipe.calibrated else None

    def begin_blocks(self) -> None:
        """From now on blocks are run and solved: their pace is counted from here."""
        self._started = self._last = time.monotonic()

    def finish(self, index: int, record: dict[str, Any], resumed: bool) -> None:
        """`resumed`: it was found finished."""
        weights = self.plan.jobs[index].layer.parameters
        self.records[index] = record
        self.resumed += resumed
        if self.plan.jobs[index].layer.name not in self._quick:
            self._left -= weights
            self._worked += 0 if resumed else weights
        now = time.monotonic()
        seconds = now - self._started
        if self._pace is not None and self.plan.jobs[index].layer.name not in self._quick:
            self._pace.finished(self.plan.jobs[index], None if resumed else now - self._last)
        self._last = now
        self.notify(
            {
                "event": "layer",
                "number": len(self.records),
                "of": len(self.plan.jobs),
                "resumed": resumed,
                "weights": weights,
                "weights_per_second": self._worked / seconds if self._worked else None,
                "seconds_left": self._seconds_left(seconds),
                "peak_memory_bytes": peak_memory_bytes(),
                **{k: v for k, v in record.items() if k != "spec"},
            }
        )

    def _seconds_left(self, seconds: float) -> float | None:
        """For the layers that are not done, of which so many seconds have gone."""
        if self._pace is not None:
            jobs = enumerate(self.plan.jobs)
            return self._pace.left(
                job for i, job in jobs if i not in self.records and job.layer.name not in self._quick
            )
        return self._left * seconds / self._worked if self._worked else None

    def note_fallback(self, name: str, notes: dict[str, Any]) -> None:
        """Say so where a layer is compressed without its statistics."""
        if "fallback" in notes:
            self.notify(
                {"event": "note", "layer": name, "text": f"{name} is compressed without data: {notes['reason']}"}
            )

    def note(self, text: str, **facts: Any) -> None:
        """Something the user must know."""
        self.notify({"event": "note", "text": text, **facts})

    def in_order(self) -> list[dict[str, Any]]:
        """All records, in the plan's order."""
        return [self.records[index] for index in range(len(self.plan.jobs))]
