"""How much memory can be taken: what the system says, and what the control groups of a container leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.system import memory

GB = 10**9


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\nfile 7\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MEMINFO", "MEMBERSHIP", "CONTROL_GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "MEMINFO").write_text(f"MemTotal: 1 kB\nMemAvailable:   {32 * GB // 1024} kB\n")
    (tmp_path / "MEMBERSHIP").write_text("3:cpuset:/a\n2:memory:/a/b\n0::/c\n")
    return tmp_path


def test_without_groups_the_system_counts(system: Path) -> None:
    assert memory.available_bytes() == 32 * GB // 1024 * 1024
    (system / "MEMBERSHIP").unlink()
    assert memory.available_bytes() == 32 * GB // 1024 * 1024
    (system / "MEMINFO").unlink()
    assert memory.available_bytes() == 0


@pytest.mark.parametrize("where", ["memory/a/b", "memory/a", "memory"])
def test_limit_of_a_group_or_of_one_around_it(system: Path, where: str) -> None:
    group(system / "CONTROL_GROUPS" / "memory", V1, str(2**63 - 4096), 9 * GB, 0)  # none
    group(system / "CONTROL_GROUPS" / where, V1, str(8 * GB), 5 * GB, 2 * GB)
    assert memory.available_bytes() == 5 * GB


def test_version_2(system: Path) -> None:
    group(system / "CONTROL_GROUPS", V2, "max", 9 * GB, 0)
    assert memory.available_bytes() == 32 * GB // 1024 * 1024
    group(system / "CONTROL_GROUPS" / "c", V2, str(4 * GB), 5 * GB, GB // 2)
    assert memory.available_bytes() == 1  # used up, which is not 0, unknown
