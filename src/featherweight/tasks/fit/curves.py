"""What each way costs in each layer: its bytes, and the relative squared error of the layer's output; kept on disk.

The code of every way of every layer is made, with the second moments of a statistics file or without data, and kept
with its error, so that a second fit of the same model measures nothing again, and true models can be put together from
what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.codes import Code, code_from
from featherweight.storage.run.store import Store
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.solve import HELD_OUT, InputStatistics, group_seed, output_error, relative_error
from featherweight.tasks.compress.stored import solve_with
from featherweight.tasks.fit.ways import Way

SAMPLED = 6
"""Layers on which a descent is compared with the sweep that stands for it."""


@dataclass(frozen=True)
class Measured:
    """A way of a layer: bytes stored, and tr(E G E') / tr(W G W') (without data |E|^2 / |W|^2), E = W - Q."""

    way: Way
    nbytes: int
    error: float
    key: str


class Curves:
    """By layer, the ways that it may go and what each of them misses.

    Parameters
    ----------
    store : what is measured is kept in it: of one model and, with statistics, of one text
    statistics : a file of second moments; None: errors of weights, codes without data
    """

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, store: Store, statistics: Path | None, seed: int = 0
    ) -> None:
        self.plan, self.checkpoint, self.store, self.statistics, self.seed = plan, checkpoint, store, statistics, seed
        self.measured: dict[str, tuple[Measured, ...]] = {}

    def measure(self, ways: Callable[[LinearLayer], Sequence[Way]], told: Callable[[int, int], None]) -> None:
        """Fill `measured`; what is in the store is taken from there. told : (layers done, all)"""
        jobs = list(self.plan.jobs)
        with contextlib.ExitStack() as stack:
            file = None
            if self.statistics is not None:
                file = stack.enter_context(StatisticsFile.open(self.statistics, self.checkpoint))
            inputs: tuple[str, InputStatistics] | None = None
            for number, job in enumerate(jobs):
                told(number, len(jobs))
                layer = job.layer
                place = (file.place(layer.name) if file else None) or layer.input_group
                if inputs is None or inputs[0] != place:
                    found = {} if file is None else file.statistics(layer.name)
                    inputs = (place, InputStatistics(found, group_seed(self.seed, layer.input_group)))
                self.measured[layer.name] = tuple(self._one(job, way, inputs[1]) for way in ways(layer))
            told(len(jobs), len(jobs))
        self._allow_for_descents(jobs, ways)

    def _one(self, job: Job, way: Way, inputs: InputStatistics, exactly: bool = False) -> Measured:
        data = bool(inputs.statistics)
        used = way if exactly else way.quick()
        treatment = used.treatment(data=data, stored=True)
        key = self._key(job.layer.name, treatment.settings())
        record = self.store.record(key)
        if record is None:
            source = LayerWeight(self.checkpoint, job.layer)
            source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
            code = solve_with(replace(job, treatment=treatment), source, inputs, self.plan.options).code
            record = {"error": self._error(source, code, inputs), "nbytes": code.nbytes, "spec": code.spec}
            self.store.keep(key, code.tensors(), record)
        return Measured(way, int(record["nbytes"]), float(record["error"]), key)

    def _error(self, source: LayerWeight, code: Code, inputs: InputStatistics) -> float:
        gram: Tensor | None = inputs.statistics.get(HELD_OUT, inputs.statistics.get("gram"))
        if gram is None:
            return relative_error(source, code, self.plan.options.threads) ** 2
        return output_error(source.rows(0, source.shape[0]).float(), code, gram)

    def _key(self, layer: str, settings: Mapping[str, Any]) -> str:
        about = json.dumps([layer, settings, self.seed, self.statistics is not None], sort_keys=True)
        return f"way-{hashlib.sha256(about.encode()).hexdigest()[:32]}"

    def _allow_for_descents(self, jobs: Sequence[Job], ways: Callable[[LinearLayer], Sequence[Way]]) -> None:
        """Errors of sweeps, times what the descents that follow leave of them: the mean over some layers."""
        if self.statistics is None:
            return
        slow = {way.name: way for job in jobs for way in ways(job.layer) if way.quick() != way}
        with StatisticsFile.open(self.statistics, self.checkpoint) as file:
            for name in slow:
                having = [job for job in jobs if any(m.way.name == name for m in self.measured[job.layer.name])]
                some = having[:: max(1, len(having) // SAMPLED)][:SAMPLED]
                ratios = []
                for job in some:
                    inputs = InputStatistics(
                        file.statistics(job.layer.name), group_seed(self.seed, job.layer.input_group)
                    )
                    if inputs.statistics:
                        exact = self._one(job, slow[name], inputs, exactly=True)
                        swept = next(m for m in self.measured[job.layer.name] if m.way.name == name)
                        ratios.append(exact.error / swept.error if swept.error > 0 else 1.0)
                left = sum(ratios) / len(ratios) if ratios else 1.0
                for layer, found in self.measured.items():
                    self.measured[layer] = tuple(
                        replace(m, error=m.error * left) if m.way.name == name else m for m in found
                    )

    def code(self, one: Measured) -> Code:
        """The code that was made to measure a way."""
        record, tensors = self.store.load(one.key)
        return code_from(record["spec"], tensors)
