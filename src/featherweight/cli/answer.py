"""How a text was made: tokens, seconds, and what ended it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

End = Literal["stop", "limit", "context"]


@dataclass(frozen=True)
class Answer:
    """How a text was made.

    prompt_tokens, tokens : read, and written
    prompt_seconds : to the first new token; seconds : for those behind it
    end : "stop" where the model ended it, "limit" at the most tokens, "context" where that was full
    """

    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    end: End

    @property
    def speed(self) -> float | None:
        """Tokens a second behind the first; None where there are none."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Clock:
    """When the tokens of a text came; `ahead`: seconds that its prompt has taken before."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.tokens = 0
        self._first = self._latest = time.monotonic()
        self._begun = self._first - ahead

    def count(self) -> None:
        self._latest = time.monotonic()
        if self.tokens == 0:
            self._first = self._latest
        self.tokens += 1

    def answer(self, prompt: int, most: int, context: int | None) -> Answer:
        """most : tokens that were allowed; one that ends a text is not counted"""
        full = context is not None and prompt + self.tokens >= context
        end: End = "limit" if self.tokens >= most else "context" if full else "stop"
        return Answer(prompt, self.tokens, self._first - self._begun, self._latest - self._first, end)
