"""The time that is left of a whole run, in the events that tell of it.

The journal knows how long the layers still take, from those that are done; a training of the whole model, which comes
after them, knows how long it still takes once it has begun. Until then it is what `estimate` finds on samples, taken
when the run begins.
"""

from __future__ import annotations

from typing import Any

from featherweight.errors import FeatherError
from featherweight.events import Observer
from featherweight.tasks.compress.estimate import tuning_seconds
from featherweight.tasks.compress.plan import Plan


class Forecast:
    """An observer that passes on what it is told. `seconds_left` of a layer's event counts the tunings after it, too;
    events of a tuning have `run_seconds_left`: its own and those after it."""

    def __init__(self, plan: Plan, notify: Observer) -> None:
        self.notify = notify
        try:
            self._tunings = tuning_seconds(plan)
        except (FeatherError, ValueError, RuntimeError):  # what cannot be tried on a sample is not foretold
            self._tunings = []

    def __call__(self, event: dict[str, Any]) -> None:
        left = event.get("seconds_left")
        if left is not None and event["event"] == "layer":
            event = {**event, "seconds_left": left + sum(seconds for _, seconds in self._tunings)}
        elif left is not None and any(kind == event["event"] for kind, _ in self._tunings):
            place = next(i for i, (kind, _) in enumerate(self._tunings) if kind == event["event"])
            event = {**event, "run_seconds_left": left + sum(seconds for _, seconds in self._tunings[place + 1 :])}
        self.notify(event)
