"""Finished layers of a run: each one's code and record as an artifact of the run folder, and the journal of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from featherweight.events import Observer
from featherweight.methods.quantize.base import HeldWeight, WeightSource
from featherweight.storage.codes import Code
from featherweight.storage.run.folder import RunFolder
from featherweight.tasks.compress.journal import Journal
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.solve import Solved, record_of

# of a record whose code is exchanged
KEPT_NOTES = ("output_error", "held_out_error", "fallback", "reason", "unchecked", "damping")


class FinishedLayers:
    """What is known of finished layers, by name.

    Attributes
    ----------
    jobs : every layer of the plan by its name
    journal : records of the layers this command has come to, and the events that tell of them
    """

    def __init__(self, plan: Plan, run: RunFolder, notify: Observer) -> None:
        self.plan, self.run = plan, run
        self.journal = Journal(plan, notify)
        self.jobs: dict[str, Job] = {job.layer.name: job for job in plan.jobs}
        self._numbers = {name: number for number, name in enumerate(self.jobs)}

    def found(self, name: str) -> dict[str, Any] | None:
        """The record that an earlier command, or an earlier step, has left of a layer."""
        return self.run.record(self._numbers[name], name)

    def code(self, name: str) -> Code:
        """The code of a finished layer."""
        return self.run.code(self._numbers[name])

    def is_done(self, name: str) -> bool:
        """Whether this command has come to the layer."""
        return self._numbers[name] in self.journal.records

    def keep(self, name: str, source: WeightSource, solved: Solved) -> dict[str, Any]:
        """Store a solved layer; its record. source : the weight that the code stands for."""
        record = self._record(name, source, solved)
        self.run.keep(self._numbers[name], solved.code, record)
        return record

    def report(self, name: str, record: dict[str, Any], resumed: bool) -> None:
        """Enter a finished layer into the journal. resumed : an earlier command had finished it."""
        self.journal.finish(self._numbers[name], record, resumed)

    def exchange(self, name: str, code: Code, weight: Tensor, notes: Mapping[str, Any] | None = None) -> None:
        """Give a finished layer another code; `notes` take the place of what its record said of the former one."""
        kept = self._kept(name) if notes is None else dict(notes)
        self.journal.records[self._numbers[name]] = self.keep(name, HeldWeight(weight), Solved(code, kept))

    def keep_tuned(self, codes: Mapping[str, Code], weight_of: Callable[[str], Tensor]) -> None:
        """Exchange the codes of many layers at once, all or none: the former ones stay aside."""
        tuned = {}
        for name, code in codes.items():
            record = self._record(name, HeldWeight(weight_of(name)), Solved(code, self._kept(name)))
            self.journal.records[self._numbers[name]] = record
            tuned[self._numbers[name]] = (code, record)
        self.run.keep_tuned(tuned)

    def is_tuned(self, names: Collection[str]) -> bool:
        """Whether those of the layers that have a job were exchanged by `keep_tuned`."""
        return self.run.is_tuned([number for name, number in self._numbers.items() if name in names])

    def _record(self, name: str, source: WeightSource, solved: Solved) -> dict[str, Any]:
        return record_of(self.jobs[name], source, solved, self.plan.options.threads)

    def _kept(self, name: str) -> dict[str, Any]:
        """What holds of a layer although its code is exchanged."""
        return {k: v for k, v in self.journal.records[self._numbers[name]].items() if k in KEPT_NOTES}
