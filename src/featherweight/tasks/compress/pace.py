"""How long the layers of a calibrated run still take, by what those before them took.

Layers of one role take about the same time in every block. What a role that has not been met will take follows from
two figures of the layers so far: seconds a weight, of those that found the statistics of their input ready, and what a
first layer of an input takes beyond them, in which the network is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from featherweight.tasks.compress.plan import Job


class Pace:
    """Told of every layer that is finished, in the order of the work."""

    def __init__(self) -> None:
        self._of_role: dict[str, list[float]] = {}
        self._met: set[str] = set()  # inputs whose statistics are there
        self._others = (0.0, 0)  # seconds and weights of layers that found theirs
        self._firsts: list[tuple[float, int]] = []

    def finished(self, job: Job, seconds: float | None) -> None:
        """`seconds` since the layer before it; None for one that was found finished, which says nothing of the pace."""
        layer = job.layer
        first = layer.input_group not in self._met
        self._met.add(layer.input_group)
        if seconds is None:
            return
        self._of_role.setdefault(layer.role, []).append(seconds)
        if first:
            self._firsts.append((seconds, layer.parameters))
        else:
            self._others = (self._others[0] + seconds, self._others[1] + layer.parameters)

    def left(self, jobs: Iterable[Job]) -> float | None:
        """Seconds for layers that are not done, in the order of the work; None before there is anything to go by.

        After a single layer nobody knows which part of its time was the network's: all of it, or none. The time left is
        between what follows from either, and the middle, in proportion, is taken.
        """
        rest = list(jobs)
        seconds, weights = self._others
        if weights:
            rate = seconds / weights
            spare = [max(0.0, took - rate * size) for took, size in self._firsts]
            return self._sum(rest, rate, math.fsum(spare) / len(spare) if spare else 0.0)
        if not self._firsts:
            return None
        took, size = (math.fsum(values) for values in zip(*self._firsts, strict=True))
        return math.sqrt(self._sum(rest, 0.0, took / len(self._firsts)) * self._sum(rest, took / size, 0.0))

    def _sum(self, jobs: Iterable[Job], rate: float, running: float) -> float:
        """With `rate` seconds a weight, and `running` more for a layer whose input has not been met."""
        met, total = set(self._met), 0.0
        for job in jobs:
            known = self._of_role.get(job.layer.role)
            if known:
                total += math.fsum(known) / len(known)
            else:
                total += rate * job.layer.parameters + (running if job.layer.input_group not in met else 0.0)
            met.add(job.layer.input_group)
        return total
