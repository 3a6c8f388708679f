"""Recipes without data: every layer is a job of its own, which any process with the same plan can do."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Any

from featherweight.events import Observer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.run.executor import Executor, Task
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.work import layer_key
from featherweight.tasks.compress.journal import Journal
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.solve import InputStatistics, group_seed, record_of, solve_layer


def layer_tasks(plan: Plan, checkpoint: Checkpoint, run: RunFolder, seed: int) -> list[Task]:
    """A job for each layer of the plan, in its order."""
    return [
        Task(
            layer_key(index),
            partial(run.record, index, job.layer.name),
            partial(solve_alone, plan, checkpoint, run, index, seed),
        )
        for index, job in enumerate(plan.jobs)
    ]


def solve_all(
    plan: Plan, checkpoint: Checkpoint, run: RunFolder, notify: Observer, seed: int, executor: Executor
) -> tuple[list[dict[str, Any]], int]:
    """Every layer's record, from its artifact or from work, and how many were found finished."""
    journal = Journal(plan, notify)
    with closing(executor.run(layer_tasks(plan, checkpoint, run, seed))) as done:
        for place, record, found in done:
            journal.finish(place, record, found)
    return journal.in_order(), journal.resumed


def solve_alone(plan: Plan, checkpoint: Checkpoint, run: RunFolder, index: int, seed: int) -> dict[str, Any]:
    """Solve one layer from its weight alone, and keep its code; its record."""
    job = plan.jobs[index]
    source = LayerWeight(checkpoint, job.layer)
    source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
    inputs = InputStatistics({}, group_seed(seed, job.layer.input_group))
    solved = solve_layer(job, source, inputs, plan.options)
    record = record_of(job, source, solved, plan.options.threads)
    run.keep(index, solved.code, record)
    return record
