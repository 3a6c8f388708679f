"""What one layer of a run leaves for the next."""

from __future__ import annotations


class Memo:
    """What a run's last layer leaves for the next, replaced as a whole. Every run has one of its own."""

    def __init__(self) -> None:
        self.latest: object = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memo)  # says nothing about options

    __hash__ = None  # type: ignore[assignment]
