"""The control groups of this process, Linux's limits on what it may use: its own and those around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEMBERSHIP = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


class ControlGroup(NamedTuple):
    """A folder of limits; `version` 1 or 2 says what its files are called."""

    folder: Path
    version: int


def control_groups(
    controller: str, membership: Path = MEMBERSHIP, root: Path = CONTROL_GROUPS
) -> Iterator[ControlGroup]:
    """Groups that may limit what a controller ("cpu", "memory") gives this process; none where there are none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            version, base = 2, root
        elif controller in controllers.split(","):
            version, base = 1, root / controllers
            base = base if base.is_dir() else root / controller
        else:
            continue
        own = base / path.strip("/")
        # In a container of its own the path is that of the host, and the group is the root.
        for folder in [own, *(parent for parent in own.parents if parent.is_relative_to(base))]:
            yield ControlGroup(folder, version)
