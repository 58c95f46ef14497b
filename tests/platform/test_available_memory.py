"""How much memory of the host is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_davinci.platform.available_memory import available_bytes

SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\n{names[2]} {cached}\nanon 3\n")


def inside(root: Path, lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    return root / "sys/fs/cgroup"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_narrowest_of_the_groups_around_a_process_decides(tmp_path: Path, which: int) -> None:
    mounts = inside(tmp_path, "0::/system.slice/job\n")
    for number, folder in enumerate((mounts, mounts / "system.slice", mounts / "system.slice/job")):
        group(folder, SECOND, "9000" if number == which else "max", 2000, 500)
    assert available_bytes(tmp_path) == 7500


def test_groups_of_the_first_version_count_with_what_they_read_from_files(tmp_path: Path) -> None:
    mounts = inside(tmp_path, "3:cpu,cpuacct:/job\n4:memory:/user/job\n0::/\n")
    group(mounts / "memory/user/job", FIRST, "9223372036854771712", 2000, 500)
    group(mounts / "memory/user", FIRST, "6000", 2000, 500)
    group(mounts / "cpu,cpuacct/job", FIRST, "10", 2000, 500)
    assert available_bytes(tmp_path) == 4500


def test_a_container_that_is_shown_the_hosts_path_has_the_limit_of_its_own_group(tmp_path: Path) -> None:
    mounts = inside(tmp_path, "4:memory:/docker/3f2a\n")
    group(mounts / "memory", FIRST, "5000", 2000, 0)
    assert available_bytes(tmp_path) == 3000


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    group(inside(tmp_path, "0::/\n"), SECOND, "1000", 2000, 500)
    assert available_bytes(tmp_path) == 0


def test_without_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > 1e6
