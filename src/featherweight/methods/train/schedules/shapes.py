"""Learning rates over the steps: a linear rise, then one of several ways down to a share of the peak.

- `cosine`: half a cosine. - `linear`: a line. - `warmup-stable-decay`: level, then a line over the last `decay` of the
steps. - `trilm` (arXiv 2407.12327): a line to the end, in which two things happen: at half of the steps the line
becomes that of a lower peak, and at two thirds weight decay ends. Each step reads its number alone, so a training that
goes on later has the same rates. The last step has the final rate.
"""

from __future__ import annotations

import math

from pydantic import Field

from featherweight.methods.train.base import Rates, Schedule
from featherweight.registry import register


class Rising(Schedule):
    """What all of them share."""

    learning_rate: float = Field(1e-3, gt=0, description="the peak")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which it is reached")
    final: float = Field(0.1, ge=0, le=1, description="rate of the last step, a share of the peak")
    weight_decay: float = Field(
        0.1, ge=0, description="of latents, decoupled from the gradient; other tensors have none"
    )

    def share(self, done: float) -> float:
        """Of the peak, `done` of the way behind the rise."""
        raise NotImplementedError

    def at(self, step: int, steps: int) -> Rates:
        rising = int(self.warmup * steps)
        if step < rising:
            return Rates(self.learning_rate * (step + 1) / rising, self.weight_decay)
        done = (step - rising) / max(1, steps - 1 - rising)
        return Rates(self.learning_rate * self.share(min(1.0, done)), self.weight_decay)


@register("schedule", "cosine")
class Cosine(Rising):
    """Down along half a cosine (see the module)."""

    def share(self, done: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@register("schedule", "linear")
class Linear(Rising):
    """Down along a line (see the module)."""

    def share(self, done: float) -> float:
        return 1 - (1 - self.final) * done


@register("schedule", "warmup-stable-decay")
class WarmupStableDecay(Rising):
    """Level, then down along a line (see the module)."""

    decay: float = Field(0.2, ge=0, le=1, description="share of the steps behind the rise over which it falls")

    def share(self, done: float) -> float:
        if self.decay == 0 or done < 1 - self.decay:
            return 1.0
        return 1 - (1 - self.final) * (done - 1 + self.decay) / self.decay


@register("schedule", "trilm")
class TwoDrops(Linear):
    """A line with TriLM's two interventions (see the module)."""

    second: float = Field(0.6, gt=0, le=1, description="the peak of the second line, a share of the first; 1: no drop")
    drop_at: float = Field(0.5, gt=0, lt=1, description="share of the steps before the second line")
    decay_until: float = Field(2 / 3, gt=0, le=1, description="share of the steps with weight decay; 1: all")
    final: float = Field(0.0, ge=0, le=1, description="rate of the last step, a share of the peak of its line")

    def at(self, step: int, steps: int) -> Rates:
        rate, decay = super().at(step, steps)
        second = self.second if step >= self.drop_at * steps else 1.0
        return Rates(rate * second, decay if self.decay_until == 1 or step < self.decay_until * steps else 0.0)
