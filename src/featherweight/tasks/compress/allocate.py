"""From a plan with candidates to one whose layers are decided: errors are measured, and the recipe's allocator chooses.

Measuring makes the code of every candidate of every layer, as the run itself would (without data, or with the
statistics of a file), and keeps one number of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.budget.base import LayerCandidates
from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.run.folder import RunFolder
from featherweight.tasks.compress.importance import block_scores
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.solve import HELD_OUT, InputStatistics, group_seed, output_error, relative_error
from featherweight.tasks.compress.stored import solve_with


@dataclass(frozen=True)
class Measuring:
    """How candidates are measured.

    seed : of the run, for transforms with random choices
    statistics : a file with the second moments of layers' inputs, for errors of outputs; None for errors of weights
    windows : of text, token ids int64 [n, T], for scores of blocks that need it
    known : errors measured before, by `key_of`; what is measured now is added, so that a mapping that is kept with a
        run saves measuring again
    """

    seed: int = 0
    statistics: Path | None = None
    windows: Tensor | None = None
    known: MutableMapping[str, float] = field(default_factory=dict)


def can_measure(plan: Plan, measuring: Measuring) -> bool:
    """Whether what the allocation of a plan chooses by can be measured; not so for outputs without statistics,
    nor for scores of hidden states without text."""
    allocation = plan.recipe.allocation
    if allocation.importance == "lim" and measuring.windows is None:
        return False
    return not allocation.needs or measuring.statistics is not None


def allocated(plan: Plan, checkpoint: Checkpoint, measuring: Measuring, notify: Observer = silent) -> Plan:
    """The plan with one treatment for each layer; the same plan where there is nothing to choose.

    Raises RecipeError where the budget cannot be met, and ValueError where the allocator chooses by errors of outputs
    and there is no file of statistics: see `can_measure`.
    """
    if not plan.candidates:
        return plan
    recipe = plan.recipe
    if recipe.allocation.needs and measuring.statistics is None:
        raise ValueError("errors of outputs are measured with a file of statistics")
    scores = _scores(plan, checkpoint, measuring)
    needs = recipe.allocation.needs_errors
    errors = measured(plan, checkpoint, measuring, notify) if needs else {}
    layers = {
        job.layer.name: replace(
            LayerCandidates.of(job.layer, plan.candidates[job.layer.name], errors.get(job.layer.name)),
            importance=scores.get(job.layer.block),
        )
        for job in plan.jobs
        if job.layer.name in plan.candidates
    }
    chosen = recipe.allocation.assign(layers)
    decided = replace(
        plan,
        jobs=tuple(replace(job, treatment=chosen.get(job.layer.name, job.treatment)) for job in plan.jobs),
        candidates={},
        most_code_bytes=None,
        bytes_are="planned after measuring",
    )
    missed = sum(
        layer.weights * next(c.error or 0.0 for c in layer.candidates if c.treatment is chosen[name])
        for name, layer in layers.items()
    )
    notify(
        {
            "event": "allocation",
            "kind": recipe.allocation.kind,
            "bits_per_weight": 8 * decided.code_bytes / max(1, decided.weights),
            "error": missed / max(1, decided.weights) if needs else None,
        }
    )
    return decided


def _scores(plan: Plan, checkpoint: Checkpoint, measuring: Measuring) -> dict[int | None, float]:
    """By block, what the allocator orders blocks by; kept with the errors, so that a run goes on as it began."""
    wanted, blocks = plan.recipe.allocation.importance, range(plan.anatomy.blocks)
    if wanted is None:
        return {}
    about = json.dumps(plan.recipe.allocation.settings(), sort_keys=True)
    keys = {block: f"{wanted}-{block}-{hashlib.sha256(about.encode()).hexdigest()[:16]}" for block in blocks}
    if any(key not in measuring.known for key in keys.values()):
        found = block_scores(plan, checkpoint, measuring.windows)
        measuring.known.update({keys[block]: found[block] for block in blocks})
    return {block: measuring.known[key] for block, key in keys.items()}


def decided(
    plan: Plan, checkpoint: Checkpoint, run: RunFolder, measuring: Measuring, notify: Observer = silent
) -> Plan:
    """`allocated`, with the errors that the run holds already, and those measured now kept in it."""
    if not plan.candidates:
        return plan
    held = run.errors()
    known = {**held, **measuring.known}
    chosen = allocated(plan, checkpoint, replace(measuring, known=known), notify)
    if known != held:
        run.keep_errors(known)
    return chosen


def measured(
    plan: Plan, checkpoint: Checkpoint, measuring: Measuring, notify: Observer = silent
) -> dict[str, list[float]]:
    """By layer, the relative squared error of each of its candidates.

    Of the weights, ||W - Q||^2 / ||W||^2; or, where the allocation asks for errors of outputs and the file has the
    layer, tr(E G E') / tr(W G W'), E = W - Q, with G the held-out second moment of its inputs or, without one, the
    gathered. Layers with a single candidate are not measured: theirs is 0.
    """
    errors: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        path = measuring.statistics if plan.recipe.allocation.needs else None
        file = None if path is None else stack.enter_context(StatisticsFile.open(path, checkpoint))
        for number, job in enumerate(plan.jobs):
            name = job.layer.name
            treatments = plan.candidates.get(name, ())
            if len(treatments) < 2:
                errors[name] = [0.0]
                continue
            jobs = [replace(job, treatment=treatment) for treatment in treatments]
            judges = plan.recipe.allocation.judges
            keys = [key_of(one, measuring.seed, file, judges) for one in jobs]
            if any(key not in measuring.known for key in keys):
                inputs = InputStatistics(
                    {} if file is None else file.statistics(name), group_seed(measuring.seed, job.layer.input_group)
                )
                source = LayerWeight(checkpoint, job.layer)
                source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
                for key, one in zip(keys, jobs, strict=True):
                    if key not in measuring.known:
                        measuring.known[key] = _error(one, source, inputs, plan)
            errors[name] = [measuring.known[key] for key in keys]
            notify({"event": "measuring layers", "layer": name, "step": number + 1, "of": len(plan.jobs)})
    return errors


def _error(job: Job, source: LayerWeight, inputs: InputStatistics, plan: Plan) -> float:
    code = solve_with(job, source, inputs, plan.options).code
    gram: Tensor | None = inputs.statistics.get(HELD_OUT, inputs.statistics.get("gram"))
    if gram is None or plan.recipe.allocation.judges == "weights":
        return relative_error(source, code, plan.options.threads) ** 2
    return output_error(source.rows(0, source.shape[0]).float(), code, gram)


def key_of(job: Job, seed: int, file: StatisticsFile | None, judges: str = "weights") -> str:
    """What a measured error depends on, beside the model: layer, treatment, seed, text of the statistics, and of what
    it is."""
    text = None if file is None else [file.text, file.settings, judges]
    about = [job.layer.name, job.treatment.settings(), seed, text]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
