"""Compression with statistics gathered before: the model is not run, and every layer is solved on its own.

The statistics are those of the original network's stream, so a recipe that must see what earlier layers became (a cross
moment, a block, the whole model) cannot use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.events import Observer
from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.run.folder import RunFolder
from featherweight.tasks.compress.journal import Journal
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.refusals import check_stored
from featherweight.tasks.compress.solve import HELD_OUT, InputGroup, group_seed, record_of, solve_layer


def run_on_stored(
    plan: Plan, checkpoint: Checkpoint, run: RunFolder, notify: Observer, seed: int, path: Path
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Records, layers found finished, and no change of the config.

    Raises RecipeError where the recipe needs more than the file holds.
    """
    recipe, journal = plan.recipe, Journal(plan, notify)
    check_stored(recipe, path, checkpoint)
    with StatisticsFile.open(path, checkpoint) as file:
        if HELD_OUT not in file.names:
            journal.note(
                f"{path.name} holds no {HELD_OUT}: no code is compared with its data-free form; gather it as well"
            )
        group: tuple[str, InputGroup] | None = None
        for index, job in enumerate(plan.jobs):
            record = run.record(index, job.layer.name)
            resumed = record is not None
            if record is None:
                place = job.layer.input_group
                if group is None or group[0] != place:  # neighbours share an input: one gram in memory
                    found = file.statistics(job.layer.name)
                    group = (place, InputGroup(found, group_seed(seed, place)))
                source = LayerWeight(checkpoint, job.layer)
                source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
                rounding = None if group[1].statistics else Nearest()
                solved = solve_layer(recipe, job, source, group[1], plan.options, (), rounding)
                if rounding is not None:
                    solved.notes.update(fallback="data-free", reason=f"{path.name} has no statistics of it")
                journal.note_fallback(job.layer.name, solved.notes)
                record = record_of(job, source, solved, plan.options.threads)
                run.keep(index, solved.code, record)
            journal.finish(index, record, resumed)
    return journal.in_order(), journal.resumed, {}
