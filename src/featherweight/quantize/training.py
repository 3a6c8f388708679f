"""The loop of every learned choice: Adam, warm-up and cosine, and the best of several checks kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.quantize.access import Tell


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
    tell: Tell,
    label: str,
    seed: int = 0,
    check: Callable[[], float | None] | None = None,
    project: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Train `theta` in place; returns (and leaves in `theta`) the values with the least `check`, else the last ones.

    gradients : sets `.grad` of theta for a batch and returns its loss
    check : a loss on samples that are not trained on; None for "cannot be measured"; the start is checked too
    project : applied after each step
    """
    optimiser = torch.optim.Adam(theta, lr=schedule.learning_rate, betas=schedule.betas)
    start = best = check() if check else None
    kept = [value.detach().clone() for value in theta]
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(schedule.steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss = gradients(order.pop())
        if not math.isfinite(loss):
            tell({"event": label, "step": step, "stopped": "the loss is not finite"})
            break
        optimiser.step()
        if project:
            project()
        if check and schedule.checked(step):
            found = check()
            if found is not None and math.isfinite(found) and (best is None or found < best):
                best, kept = found, [value.detach().clone() for value in theta]
            tell({"event": label, "step": step + 1, "of": schedule.steps, "loss": loss, "held_out": found})
    facts: dict[str, Any] = {"event": label, "held_out_before": start, "held_out_after": best}
    if best is not None:
        with torch.no_grad():
            for value, best_value in zip(theta, kept, strict=True):
                value.copy_(best_value)
        tell(facts)
    return theta
