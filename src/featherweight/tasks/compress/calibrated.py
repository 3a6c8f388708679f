"""Compression with calibration: the network is run block by block, and each block's layers are solved as it is reached.

For every block: choices that see the whole block change it; then, set after set of layers that share an input, the
statistics of the stream as it is by then are gathered and the layers solved, each put back as what its code decodes to.
Finished layers are artifacts as in the data-free run; a run that was interrupted puts them back, moves the streams on,
and continues at the block and the set it was in, with the same statistics and so the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featherweight.events import Observer
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.quantize.base import HeldWeight, WeightSource
from featherweight.model.network.host import parameter_of
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.run.folder import RunFolder
from featherweight.tasks.compress.block_steps import BlockSteps
from featherweight.tasks.compress.finished import FinishedLayers
from featherweight.tasks.compress.layer_statistics import LayerStatistics
from featherweight.tasks.compress.model_steps import ModelSteps
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.refusals import check_base
from featherweight.tasks.compress.solve import InputStatistics, Solved, group_seed, solve_layer


@dataclass
class CalibratedRun:
    """The work of one command. `solve()` leaves an artifact for every job and the changed plain tensors of each block.

    base : for recipes that compare with the model a fine-tuned one came from, else None
    """

    plan: Plan
    checkpoint: Checkpoint
    run: RunFolder
    calibration: Calibration
    notify: Observer
    seed: int
    base: Checkpoint | None = None

    def __post_init__(self) -> None:
        self.finished = FinishedLayers(self.plan, self.run, self.notify)
        self.journal = self.finished.journal
        self.model = ModelSteps(self.plan, self.run, self.calibration, self.finished, self.seed)
        self.statistics = LayerStatistics(
            self.plan, self.checkpoint, self.calibration, self.notify, self.seed, self.base
        )

    @property
    def config(self) -> dict[str, Any]:
        """Entries of config.json that must change with the weights."""
        return self.model.config

    def solve(self) -> list[dict[str, Any]]:
        """Records of all jobs in the plan's order."""
        if self.plan.recipe.calibration.held_out == 0:
            self.journal.note(
                "calibration.held_out is 0: nothing is compared with its data-free form, whatever comes out"
            )
        if self.base is not None:
            check_base([job.layer for job in self.plan.jobs], self.checkpoint, self.base)
        if not self.model.is_corrected():
            self.run.drop_tuned()  # some of them may be left, and must not be taken for layers as they were solved
        self.model.transform()
        self._embed()
        guided = [name for name, job in self.finished.jobs.items() if job.treatment.needs]
        if guided:
            self.calibration.guide(guided, self.run.store)
        self.journal.begin_blocks()
        if self.model.rounds:
            self.model.round()
        else:
            for session in self.calibration.blocks():
                self._block(session)
        self._outside_blocks()
        self.model.correct()
        return self.journal.in_order()

    def _embed(self) -> None:
        """Embeddings that are coded by themselves come first: the blocks are calibrated on what they decode to."""
        embedding = self.plan.anatomy.embedding
        job = self.finished.jobs.get(embedding.name) if embedding else None
        if job is None or not job.treatment.by_itself or job.layer.name not in self.calibration.host.layers:
            return
        self._solve_outside(job)
        self.calibration.embeddings[job.layer.name] = self.finished.code(job.layer.name).decode()

    def _block(self, session: BlockSession) -> None:
        blocks = len(self.calibration.host.blocks)
        steps = BlockSteps(self.plan, session, blocks, self.finished, self.statistics, self.seed)
        if not steps.names:
            session.skip({}, {})
            return
        known = {name: self.finished.found(name) for name in steps.names}
        changed = self.run.changed(session.index)
        if changed is not None and all(known.values()):
            steps.put_back(known, changed)
            return
        steps.work(known)
        self.model.keep_changed(session.index, session.changed)
        session.advance()

    def _outside_blocks(self) -> None:
        """Layers that no step came to are compressed without data."""
        for name, job in self.finished.jobs.items():
            if not self.finished.is_done(name):
                self._solve_outside(job)

    def _solve_outside(self, job: Job) -> None:
        name = job.layer.name
        record = self.finished.found(name)
        resumed = record is not None
        if record is None:
            source = self._source_of(job)
            inputs = InputStatistics({}, group_seed(self.seed, job.layer.input_group))
            alone = job.treatment.by_itself
            solved = solve_layer(job if alone else job.without_data(), source, inputs, self.plan.options)
            if not alone:
                reason = "calibration does not run through it"
                solved = Solved(solved.code, {**solved.notes, "fallback": "data-free", "reason": reason})
                self.journal.note_fallback(name, solved.notes)
            record = self.finished.keep(name, source, solved)
        self.finished.report(name, record, resumed)

    def _source_of(self, job: Job) -> WeightSource:
        """The weight of a layer that no block holds: what a transform of the whole model made of it, if there was one,
        or the stored one."""
        host = self.calibration.host
        if job.layer.name in host.layers and job.layer.tensor in host.replaced:
            slot = host.slots[job.layer.name]
            return HeldWeight(slot.view(parameter_of(host, slot.parameter)).to("cpu", torch.float32, copy=True))
        source = LayerWeight(self.checkpoint, job.layer)
        source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
        return source
