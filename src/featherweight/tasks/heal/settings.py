"""How a compressed model is healed, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from featherweight.errors import FeatherError

Level = Literal["model", "blocks", "scales"]
TRAININGS = {"latents": 0.005, "cat-q": 0.0015}
"""Ways of training digits, and the learning rate of each unless one is given."""
LEVELS: tuple[Level, ...] = ("model", "blocks", "scales")
MOST_WINDOW = 8


@dataclass(frozen=True)
class HealSettings:
    """What is trained, on how much, and how.

    level : "model": digits, scales and norms of all blocks, against the original's predictions; "blocks": the same of a
        few blocks at a time, each against the original's hidden states, in the memory of these blocks; "scales": scales
        and norms of the whole model, digits as they are
    window : with "blocks", how many blocks are trained together; windows move on by half of it, one block at least
    minutes : of the whole command, or of what is left of it in a run that goes on; the number of steps follows from how
        long one takes here, once, and is kept
    steps : of the training (of each window of blocks), in place of minutes
    training : "latents": digits are those nearest to latent values, gradients go straight through; "cat-q": the trits
        of one plane follow from learned factors of groups, soft at first (see the correction `cat-q`); norms stay then
    learning_rate : of Adam, of changes relative to each scale, and of latent values to the largest scale of their
        group, or of cat-q's factors; None: that of `TRAININGS`
    batch : windows of text a step
    windows, length : of text, at most, and their tokens. What is trained on short windows alone loses at the later
        positions of long ones
    held_out : windows at their end that nothing is fitted to, and which choose the step that is kept
    loss : with "model" and "scales": "kl", divergence of the next-token distributions; "states", squared error of the
        last hidden states, relative; "mixed", their sum
    score : tokens of another text on which the model is measured before and after; 0: not
    """

    level: Level = "model"
    window: int = 1
    minutes: float | None = None
    steps: int | None = None
    training: Literal["latents", "cat-q"] = "latents"
    learning_rate: float | None = None
    batch: int = 2
    windows: int = 4096
    length: int = 1024
    held_out: int = 16
    loss: Literal["kl", "states", "mixed"] = "kl"
    score: int = 16384
    seed: int = 0

    def check(self) -> None:
        """FeatherError for settings that mean nothing."""
        if self.level not in LEVELS:
            raise FeatherError(f"there is no level {self.level!r} of healing: choose one of {', '.join(LEVELS)}")
        if (self.minutes is None) == (self.steps is None):
            raise FeatherError("healing takes either a number of minutes or a number of steps")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise FeatherError(f"minutes is {self.minutes:g}, expected a number above 0")
        if self.steps is not None and self.steps < 1:
            raise FeatherError(f"steps is {self.steps}, expected 1 or more")
        if not 1 <= self.window <= MOST_WINDOW:
            raise FeatherError(f"window is {self.window}, expected 1 to {MOST_WINDOW} blocks")
        if self.window > 1 and self.level != "blocks":
            raise FeatherError(f"a window of {self.window} blocks is for the level blocks, not for {self.level}")
        if self.loss not in ("kl", "states", "mixed"):
            raise FeatherError(f"there is no loss {self.loss!r} of healing: choose kl, states or mixed")
        if self.loss != "kl" and self.level == "blocks":
            raise FeatherError("blocks are healed by their hidden states: the loss is not to be chosen there")
        for name in ("batch", "length", "held_out"):
            if getattr(self, name) < 1:
                raise FeatherError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.training not in TRAININGS:
            raise FeatherError(f"there is no training {self.training!r} of healing: choose {' or '.join(TRAININGS)}")
        if self.training == "cat-q" and self.level == "scales":
            raise FeatherError(
                "cat-q chooses digits anew, which the level scales leaves as they are: take another level"
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise FeatherError(f"learning_rate is {self.learning_rate:g}, expected a number above 0")

    def identity(self) -> dict[str, Any]:
        """What the result depends on; minutes only by the steps that they came to."""
        return {name: value for name, value in asdict(self).items() if name != "score"} | {"learning_rate": self.rate}

    @property
    def rate(self) -> float:
        """The learning rate."""
        return TRAININGS[self.training] if self.learning_rate is None else self.learning_rate
