"""What a run takes of a device's memory, and whether that is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from featherweight.errors import FeatherError
from featherweight.system.units import parse_size, size_text

SPARE_SHARE = 0.5  # of what the plan leaves free: passes may fill it with what they would compute again


@dataclass(frozen=True)
class Phase:
    """A time of a run.

    fixed : what takes how many bytes, whatever the batch
    a_window : bytes that each window of text adds; 0 where none is on the device
    wanted : the windows of a batch
    """

    name: str
    fixed: Mapping[str, int]
    a_window: int = 0
    wanted: int = 0

    def nbytes(self, windows: int | None = None) -> int:
        """With batches of at most so many windows; None: as many as the recipe wants."""
        together = self.wanted if windows is None else min(windows, self.wanted)
        return sum(self.fixed.values()) + together * self.a_window


@dataclass(frozen=True)
class DeviceShare:
    """What a run takes of a device.

    limit : bytes it may take; None where nobody knows
    said : whether somebody has set that limit, else it is what is free
    length : tokens a window
    windows : the most windows of a batch; None for as many as the recipe wants, 0 where not even one fits
    """

    device: str
    phases: tuple[Phase, ...]
    length: int = 0
    limit: int | None = None
    said: bool = False
    windows: int | None = None

    @property
    def windows_a_pass(self) -> int | None:
        """The most windows to run at once; None for as many as the recipe wants."""
        return None if self.windows is None else max(1, self.windows)

    @property
    def nbytes(self) -> int:
        """The expected peak; with one window a batch where even that is too much."""
        return max((phase.nbytes(self.windows_a_pass) for phase in self.phases), default=0)

    def spare_bytes(self, host: int) -> int:
        """What passes may fill of the device to save time; so much of main memory where the network runs there."""
        if not self.phases:
            return host
        return host if self.limit is None else max(0, int(SPARE_SHARE * (self.limit - self.nbytes)))

    def check(self) -> None:
        """FeatherError where it does not fit, with what needs how much."""
        if self.limit is None or self.nbytes <= self.limit:
            return
        worst = max(self.phases, key=lambda phase: phase.nbytes(1))
        parts = {what: size for what, size in worst.fixed.items() if size}
        if worst.a_window:
            parts[f"one window of {self.length} tokens"] = worst.a_window
        told = ", ".join(f"{size_text(size)} {what}" for what, size in sorted(parts.items(), key=lambda part: -part[1]))
        source = "--max-device-memory gives" if self.said else "free are"
        needed = f"{worst.name} needs {size_text(worst.nbytes(1))} on {self.device}"
        shorter = "shorten the windows (--set calibration.length=N), " if worst.a_window else ""
        raise FeatherError(
            f"{needed}, and {source} {size_text(self.limit)}: {told}; "
            f"{shorter}take a recipe that holds less at once, or --device cpu"
        )

    def facts(self) -> dict[str, Any]:
        """JSON-able, for the log and `feather plan`."""
        return {"device_memory_bytes": self.nbytes, "device_memory_limit": self.limit, "device_windows": self.windows}


NOWHERE = DeviceShare("cpu", ())
"""Of runs in main memory."""


def limit_on(device: torch.device, named: str | torch.device, asked: int | str | None) -> int | None:
    """Bytes that somebody allows on a device. FeatherError for a limit on the CPU, which --max-memory limits; where
    "auto" found none but that, a limit does nothing."""
    if asked is None:
        return None
    limit = parse_size(asked, "--max-device-memory") if isinstance(asked, str) else asked
    if limit < 1:
        raise FeatherError(f"--max-device-memory is {limit} bytes; write it like 800MB, 2GB or 1.5GiB")
    if device.type != "cpu":
        return limit
    if str(named) == "auto":
        return None
    raise FeatherError("--max-device-memory limits the memory of a device other than the CPU; --max-memory is for it")
