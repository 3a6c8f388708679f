"""What a healing came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.system.units import size_text


@dataclass(frozen=True)
class Score:
    """On held-out text: mean KL to the original in nats a token, perplexity, share of equal most likely tokens."""

    kl: float | None
    perplexity: float
    agreement: float | None


@dataclass(frozen=True)
class Healing:
    """The result of `featherweight.heal`.

    out : the folder; bytes : of its weight files, which are those of the folder it was made from
    level, steps, tokens : what was trained; steps of all trainings together, tokens that they saw
    loss_before, loss_after : on the windows that chose the step, of each training in turn
    moved : share of weights whose digits changed
    kept : whether anything trained was better than what was given; if not, the output is that
    before, after, original : scores of the given folder, the result and the original on another text; None where that
        was not asked for
    curve : of the trainings, a point for each word: step, loss, held_out
    seconds, peak_memory_bytes, planned_memory_bytes : of this call
    """

    out: Path
    bytes: int
    level: str
    steps: int
    tokens: int
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]
    moved: float
    kept: bool
    before: Score | None = None
    after: Score | None = None
    original_perplexity: float | None = None
    curve: tuple[Mapping[str, float], ...] = field(default=(), repr=False)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    planned_memory_bytes: int = 0

    @property
    def recovered(self) -> float | None:
        """Share of the excess perplexity that is gone; None where it was not measured, or there was none."""
        if self.before is None or self.after is None or self.original_perplexity is None:
            return None
        excess = self.before.perplexity - self.original_perplexity
        return (self.before.perplexity - self.after.perplexity) / excess if excess > 0 else None

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what is not known is null."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found |= {name: None if found[name] is None else vars(found[name]) for name in ("before", "after")}
        return found | {
            "out": str(self.out),
            "loss_before": list(self.loss_before),
            "loss_after": list(self.loss_after),
            "curve": [dict(point) for point in self.curve],
            "recovered": self.recovered,
        }

    def __str__(self) -> str:
        score = "" if self.before is None or self.after is None else f", KL {self.before.kl:.4f} -> {self.after.kl:.4f}"
        return f"{self.out}: {size_text(self.bytes)}, healed in {self.steps} steps{score}"
