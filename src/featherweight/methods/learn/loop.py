"""The loop of every learned choice: Adam, warm-up and cosine, and the best of several checks kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from featherweight.events import Observer
from featherweight.storage.run.training_store import NO_STORE, TrainingState, TrainingStore

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of what Adam keeps of each tensor


@dataclass(frozen=True)
class Schedule:
    """steps, a learning rate, the share of steps over which it rises, and how often the result is checked."""

    steps: int
    learning_rate: float
    warmup: float = 0.0
    checks: int = 8
    betas: tuple[float, float] = (0.9, 0.999)

    def rate(self, step: int) -> float:
        """Linear rise over the first share `warmup` of the steps, then cosine to zero."""
        rising = int(self.steps * self.warmup)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def checked(self, step: int) -> bool:
        """Whether the result is measured after this step; always after the last."""
        return (step + 1) * self.checks // self.steps > step * self.checks // self.steps


def minimise(
    theta: list[Tensor],
    gradients: Callable[[int], float],
    batches: int,
    schedule: Schedule,
    notify: Observer,
    label: str,
    seed: int = 0,
    check: Callable[[], float | None] | None = None,
    project: Callable[[], None] | None = None,
    store: TrainingStore = NO_STORE,
) -> list[Tensor]:
    """Train `theta` in place; returns (and leaves in `theta`) the values with the least `check`, else the last ones.

    gradients : sets `.grad` of theta for a batch and returns its loss
    check : a loss on samples that are not trained on; None for "cannot be measured"; the start is checked too
    project : applied after each step
    store : where the state goes at times; a state of the same task that is there is gone on from, with the same result
    """
    course = _Course(theta, batches, schedule, label, seed, check is not None)
    found = store.load(course.task)
    if found is not None:
        course.take(found)
    elif check:
        course.start = course.best = check()
    while course.step < schedule.steps:
        for group in course.optimiser.param_groups:
            group["lr"] = schedule.rate(course.step)
        loss = gradients(course.next_batch())
        if not math.isfinite(loss):
            notify({"event": label, "step": course.step, "stopped": "the loss is not finite"})
            break
        course.optimiser.step()
        if project:
            project()
        if check and schedule.checked(course.step):
            measured = check()
            course.offer(measured)
            notify({"event": label, "step": course.step + 1, "of": schedule.steps, "loss": loss, "held_out": measured})
        course.step += 1
        if store.due():
            store.save(course.state())
    if course.best is not None:
        with torch.no_grad():
            for value, best_value in zip(theta, course.kept, strict=True):
                value.copy_(best_value)
        notify({"event": label, "held_out_before": course.start, "held_out_after": course.best})
    return theta


class _Course:
    """Where a training is: all that its further steps depend on, beside what `gradients` and `check` hold.

    kept : the values with the least check; empty where nothing is checked
    order : the batches that are left of this round, the next one last
    """

    def __init__(
        self, theta: list[Tensor], batches: int, schedule: Schedule, label: str, seed: int, checked: bool
    ) -> None:
        self.theta, self.batches = theta, batches
        self.optimiser = torch.optim.Adam(theta, lr=schedule.learning_rate, betas=schedule.betas)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.order = 0, list[int]()
        self.start: float | None = None
        self.best: float | None = None
        self.kept = [value.detach().clone() for value in theta] if checked else []
        self.task = {
            "label": label,
            "schedule": {**asdict(schedule), "betas": list(schedule.betas)},
            "batches": batches,
            "seed": seed,
            "shapes": [list(value.shape) for value in theta],
        }

    def next_batch(self) -> int:
        self.order = self.order or torch.randperm(self.batches, generator=self.generator).tolist()
        return self.order.pop()

    def offer(self, measured: float | None) -> None:
        """Keep the present values if they are the best so far."""
        if measured is not None and math.isfinite(measured) and (self.best is None or measured < self.best):
            self.best, self.kept = measured, [value.detach().clone() for value in self.theta]

    def state(self) -> TrainingState:
        tensors = {"generator": self.generator.get_state()}
        counts: list[float | None] = []  # Adam counts the steps of each tensor: one without a gradient makes none
        for i, value in enumerate(self.theta):
            moments = self.optimiser.state.get(value, {})
            counts.append(float(moments["step"]) if moments else None)
            tensors |= {f"{name}.{i}": moments[name] for name in MOMENTS if moments}
            tensors[f"value.{i}"] = value.detach()
        tensors |= {f"kept.{i}": value for i, value in enumerate(self.kept)}
        facts = {"order": self.order, "start": self.start, "best": self.best, "counts": counts}
        return TrainingState(self.task, self.step, facts, tensors)

    def take(self, state: TrainingState) -> None:
        """Go on from `state`."""
        tensors, facts = state.tensors, state.facts
        self.step, self.order = state.step, list(facts["order"])
        self.start, self.best = facts["start"], facts["best"]
        self.generator.set_state(tensors["generator"])
        with torch.no_grad():
            for i, (value, count) in enumerate(zip(self.theta, facts["counts"], strict=True)):
                value.copy_(tensors[f"value.{i}"])
                if count is not None:
                    moments = {name: tensors[f"{name}.{i}"].clone() for name in MOMENTS}
                    self.optimiser.state[value] = {"step": torch.tensor(count), **moments}
        self.kept = [tensors[f"kept.{i}"].clone() for i in range(len(self.kept))]
