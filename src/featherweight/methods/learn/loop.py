"""The loop of every learned choice: an optimiser, a schedule, a sampler, and the best of several checks kept.

Its parts are exchangeable (`Training`); what trains hands in tensors and a function that sets their gradients. Where
the tensors are, the optimiser works and the best values are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.learn.batches import Sampler
from featherweight.methods.learn.optimisers import Optimiser, adam, remembered, remind
from featherweight.storage.run.training_store import NO_STORE, TrainingState, TrainingStore

TELL_SECONDS = 10.0  # between two words about a training whose checks are further apart
RETREAT = 0.2  # of the learning rate, where it was too high for a model
LOST = 1.3  # times the loss at the start; trainings that end below it have been a few percent above it on the way


@dataclass(frozen=True)
class Schedule:
    """steps, a learning rate, the share of steps over which it rises, and how often the result is checked."""

    steps: int
    learning_rate: float
    warmup: float = 0.0
    checks: int = 8

    def rate(self, step: int) -> float:
        """Linear rise over the first share `warmup` of the steps, then cosine to zero."""
        rising = int(self.steps * self.warmup)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def checked(self, step: int) -> bool:
        """Whether the result is measured after this step; always after the last."""
        return (step + 1) * self.checks // self.steps > step * self.checks // self.steps


@dataclass(frozen=True)
class Training:
    """How something is trained.

    label : of its events, and of its saved state
    schedule : how long, and how fast
    optimiser : see `featherweight.methods.learn.optimisers`
    retreats : how often a check far above the start's, where none was below it so far, takes the values back to the
        start and the rate to a fifth of what it was; the next such check ends it. None: such checks change nothing
    """

    label: str
    schedule: Schedule
    optimiser: Optimiser = adam()
    retreats: int | None = None


def minimise(
    theta: list[Tensor],
    gradients: Callable[[int], float],
    training: Training,
    sampler: Sampler,
    *,
    check: Callable[[], float | None] | None = None,
    project: Callable[[], None] | None = None,
    notify: Observer = silent,
    store: TrainingStore = NO_STORE,
) -> list[Tensor]:
    """Train leaf tensors in place, on the devices where they are.

    Parameters
    ----------
    theta : float tensors of any shapes
    gradients : sets `.grad` of theta for the batch of a number and returns its loss
    training : see `Training`
    sampler : the numbers of the batches
    check : a loss on samples that are not trained on; None for "cannot be measured"; the start is checked too
    project : applied after each step
    notify : told of every check, of a step where checks are far apart, and of the end
    store : where the state goes at times; a state of the same task that is there is gone on from, with the same result

    Returns
    -------
    `theta`, with the values of the least `check`, or, where nothing is checked, those of the last step. A loss that is
    not finite ends it, and a check after which there is no more retreat.
    """
    schedule, label = training.schedule, training.label
    trainer = _Trainer(theta, training, sampler, check is not None)
    found = store.load(trainer.task)
    if found is not None:
        trainer.take(found)
    elif check:
        trainer.start = trainer.best = check()
    progress = _Progress(label, trainer.step, schedule.steps)
    while trainer.step < schedule.steps:
        for group in trainer.optimiser.param_groups:
            group["lr"] = trainer.share * schedule.rate(trainer.step)
        loss = gradients(sampler.next())
        if not math.isfinite(loss):
            notify({"event": label, "step": trainer.step, "stopped": "the loss is not finite"})
            break
        trainer.optimiser.step()
        if project:
            project()
        if check and schedule.checked(trainer.step):
            measured = check()
            trainer.offer(measured)
            notify(progress.event(trainer.step + 1, loss) | {"held_out": measured})
            if training.retreats is not None and trainer.is_lost(measured):
                reason = f"held out, the loss is {measured:.4g} after {trainer.start:.4g} at the start"
                if trainer.retreats >= training.retreats:
                    notify({"event": label, "step": trainer.step + 1, "stopped": reason})
                    break
                trainer.retreat()
                rate = trainer.share * schedule.learning_rate
                notify(
                    {"event": "note", "text": f"{label}: {reason}; it begins again from there, at the rate {rate:.2g}"}
                )
        elif progress.due():
            notify(progress.event(trainer.step + 1, loss))
        trainer.step += 1
        if store.due():
            store.save(trainer.state())
    if trainer.best is not None:
        with torch.no_grad():
            for value, best_value in zip(theta, trainer.kept, strict=True):
                value.copy_(best_value)
        notify({"event": label, "held_out_before": trainer.start, "held_out_after": trainer.best})
    return theta


class _Progress:
    """What is told of a training between its start, at a step, and its end."""

    def __init__(self, label: str, first: int, steps: int) -> None:
        self.label, self.first, self.steps = label, first, steps
        self.begun = self.told = time.monotonic()

    def due(self) -> bool:
        """Whether nothing has been told for long."""
        return time.monotonic() - self.told > TELL_SECONDS

    def event(self, step: int, loss: float) -> dict[str, Any]:
        """After so many steps."""
        self.told = time.monotonic()
        left = (self.told - self.begun) * (self.steps - step) / (step - self.first)
        return {"event": self.label, "step": step, "of": self.steps, "loss": loss, "seconds_left": left}


class _Trainer:
    """Where a training is: all that its further steps depend on, beside what `gradients` and `check` hold.

    kept : the values with the least check; empty where nothing is checked
    """

    def __init__(self, theta: list[Tensor], training: Training, sampler: Sampler, checked: bool) -> None:
        self.theta, self.sampler = theta, sampler
        self.optimiser = training.optimiser(theta, training.schedule.learning_rate)
        self.step = 0
        self.start: float | None = None
        self.best: float | None = None
        self.retreats, self.share = 0, 1.0
        self.kept = [value.detach().clone() for value in theta] if checked else []
        self.task: dict[str, Any] = {
            "label": training.label,
            "schedule": asdict(training.schedule),
            "optimiser": _plain(type(self.optimiser).__name__, self.optimiser.defaults),
            "sampler": _plain(type(sampler).__name__, vars(sampler)),
            "shapes": [list(value.shape) for value in theta],
        }

    def offer(self, measured: float | None) -> None:
        """Keep the present values if they are the best so far."""
        if measured is not None and math.isfinite(measured) and (self.best is None or measured < self.best):
            self.best, self.kept = measured, [value.detach().clone() for value in self.theta]

    def is_lost(self, measured: float | None) -> bool:
        """Whether a check is far above the start's, and none was below it so far."""
        if measured is None or self.start is None or self.best is None:
            return False
        return self.best >= self.start and not measured <= LOST * self.start

    def retreat(self) -> None:
        """Back to the start, at a lower rate; the optimiser forgets what it has seen."""
        self.retreats, self.share = self.retreats + 1, RETREAT ** (self.retreats + 1)
        self.optimiser.state.clear()
        with torch.no_grad():
            for value, kept in zip(self.theta, self.kept, strict=True):
                value.copy_(kept)

    def state(self) -> TrainingState:
        tensors = {"generator": self.sampler.generator_state()}
        tensors |= {f"moment.{name}": kept for name, kept in remembered(self.optimiser, self.theta).items()}
        tensors |= {f"value.{i}": value.detach() for i, value in enumerate(self.theta)}
        tensors |= {f"kept.{i}": value for i, value in enumerate(self.kept)}
        facts = {"order": self.sampler.left(), "start": self.start, "best": self.best, "retreats": self.retreats}
        return TrainingState(self.task, self.step, facts, tensors)

    def take(self, state: TrainingState) -> None:
        """Go on from `state`."""
        tensors, facts = state.tensors, state.facts
        self.step, self.start, self.best = state.step, facts["start"], facts["best"]
        self.retreats = facts["retreats"]
        self.share = RETREAT**self.retreats
        self.sampler.resume(list(facts["order"]), tensors["generator"])
        with torch.no_grad():
            for i, value in enumerate(self.theta):
                value.copy_(tensors[f"value.{i}"])
        prefix = "moment."
        moments = {name.removeprefix(prefix): kept for name, kept in tensors.items() if name.startswith(prefix)}
        remind(self.optimiser, self.theta, moments)
        kept = zip(range(len(self.kept)), self.theta, strict=False)
        self.kept = [tensors[f"kept.{i}"].to(value.device, copy=True) for i, value in kept]


def _plain(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """What of an object's settings JSON holds, with its kind; private ones left out."""
    found: dict[str, Any] = {"kind": kind}
    for name, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        if not name.startswith("_") and isinstance(plain, int | float | str | list | None):
            found[name] = plain
    return found
