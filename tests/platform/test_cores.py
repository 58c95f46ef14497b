"""How many processors a process may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_davinci.platform.cores import usable_cores


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def inside(root: Path, lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    return root / "sys/fs/cgroup"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("said", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", 16),
        ("9999999 1000", 16),
        ("", 16),
    ],
)
def test_a_container_has_the_time_that_it_was_given(tmp_path: Path, said: str, cores: int) -> None:
    write(inside(tmp_path, "0::/\n") / "cpu.max", said)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_narrowest_of_the_groups_around_it_decides(tmp_path: Path, which: int) -> None:
    mounts = inside(tmp_path, "0::/slice/job\n")
    for number, folder in enumerate((mounts, mounts / "slice", mounts / "slice/job")):
        write(folder / "cpu.max", "300000 100000" if number == which else "max 100000")
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_groups_of_the_first_version(tmp_path: Path, folder: str) -> None:
    mounts = inside(tmp_path, "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    write(mounts / folder / "job/cpu.cfs_period_us", "50000")
    write(mounts / folder / "job/cpu.cfs_quota_us", "200000")
    assert usable_cores(tmp_path) == 4
    write(mounts / folder / "job/cpu.cfs_quota_us", "-1")
    assert usable_cores(tmp_path) == 16


def test_without_groups_it_is_what_it_may_run_on(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 16
