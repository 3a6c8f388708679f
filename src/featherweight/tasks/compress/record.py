"""What the record of an output says about its compression: when, where, by which version, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.record import compression_record
from featherweight.system.machine import machine_facts, now_text
from featherweight.system.memory import peak_memory_bytes
from featherweight.tasks.compress.plan import Plan
from featherweight.version import __version__


@dataclass(frozen=True)
class Beginning:
    """What is known when a process sets to work on an output.

    clock : time.monotonic() then
    resident_bytes : of memory then, which is no part of the work
    first : when the work was first begun, ISO 8601; earlier than this process where a part was found finished
    source : the model's name, without its folder
    told : of the run's settings: threads, device, solved_on
    """

    clock: float
    resident_bytes: int
    first: str
    source: str
    told: dict[str, Any]

    @classmethod
    def of(cls, measured: tuple[float, int], source: str, told: dict[str, Any], run: RunFolder) -> Beginning:
        """`measured`: clock and resident bytes; `first` is what the run folder remembers, or now."""
        return cls(*measured, run.remembered("first_begun", now_text()), source, told)


def record_of(plan: Plan, beginning: Beginning, resumed: int) -> str:
    """The text of the record file, once the layers are written. `resumed` of them were found finished."""
    seconds, device = time.monotonic() - beginning.clock, str(beginning.told["device"])
    return compression_record(
        {
            "featherweight": __version__,
            "recipe": plan.recipe.name,
            "source": beginning.source,
            "first_begun": beginning.first,
            "finished": now_text(),
            "seconds": round(seconds, 3),
            "resumed": resumed,
            "peak_memory_bytes": peak_memory_bytes(),
            "resident_at_start_bytes": beginning.resident_bytes,
            "weights_per_second": plan.weights / seconds if seconds > 0 and not resumed else None,
            "threads": beginning.told["threads"],
            "device": device,
            "solved_on": str(beginning.told["solved_on"]),
            "machine": machine_facts(device),
        }
    )
