"""Compression with statistics gathered before: the model is not run, and every layer is solved on its own.

The statistics are those of the original network's stream, so a recipe that must see what earlier layers became (a cross
moment, a block, the whole model) cannot use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.events import Observer
from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.methods.quantize.base import SolveOptions, WeightSource
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.run.folder import RunFolder
from featherweight.tasks.compress.finished import FinishedLayers
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.refusals import check_stored
from featherweight.tasks.compress.solve import HELD_OUT, InputStatistics, Solved, group_seed, solve_layer


def run_on_stored(
    plan: Plan, checkpoint: Checkpoint, run: RunFolder, notify: Observer, seed: int, path: Path
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Records, layers found finished, and no change of the config.

    Raises RecipeError where the recipe needs more than the file holds.
    """
    check_stored(plan.recipe, path, checkpoint)
    finished = FinishedLayers(plan, run, notify)
    journal = finished.journal
    with StatisticsFile.open(path, checkpoint) as file:
        if HELD_OUT not in file.names:
            journal.note(
                f"{path.name} holds no {HELD_OUT}: no code is compared with its data-free form; gather it as well"
            )
        inputs: tuple[str, InputStatistics] | None = None
        for job in plan.jobs:
            name, group = job.layer.name, job.layer.input_group
            place = file.place(name) or group
            record = finished.found(name)
            resumed = record is not None
            if record is None:
                if inputs is None or inputs[0] != place:  # neighbours share an input: one gram in memory
                    inputs = (place, InputStatistics(file.statistics(name), group_seed(seed, group)))
                source = LayerWeight(checkpoint, job.layer)
                source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
                solved = solve_with(job, source, inputs[1], plan.options)
                if job.treatment.needs and not inputs[1].statistics:
                    solved.notes.update(fallback="data-free", reason=f"{path.name} has no statistics of it")
                journal.note_fallback(name, solved.notes)
                record = finished.keep(name, source, solved)
            finished.report(name, record, resumed)
    return journal.in_order(), journal.resumed, {}


def solve_with(job: Job, source: WeightSource, inputs: InputStatistics, options: SolveOptions) -> Solved:
    """The code of a layer with the statistics a file holds of it: without data where it has none, or needs none."""
    if job.treatment.needs and inputs.statistics:
        return solve_layer(job, source, inputs, options)
    return solve_layer(job.without_data(), source, InputStatistics({}, inputs.seed), options)
