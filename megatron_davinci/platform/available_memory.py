"""How much memory of the host a process may still take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

# A group's limit, what it has in use, and the line of `memory.stat` that says how much of that was read from files.
_SECOND = ("memory.max", "memory.current", "inactive_file")
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this machine, or this container, has left without taking it from anybody.

    Args:
        root: Where `proc` and `sys` are.
    """
    left = [int(psutil.virtual_memory().available)]
    for group, (limit, used, cached) in _groups(root):
        # A group without a limit, or one that is not shown to this process, holds nothing back.
        with contextlib.suppress(OSError, ValueError, StopIteration):
            room = int((group / limit).read_text()) - int((group / used).read_text())
            # What was read from files counts as used, and goes where memory is wanted.
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(room + next(int(value) for name, value in lines if name == cached))
    return max(0, min(left))


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups that this process is in, of both versions, and all groups that those are in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # In a container that is not told its place, the path is the host's, and only its own group is there.
        inner = PurePosixPath(path.lstrip("/"))
        if controllers == "":
            for above in (inner, *inner.parents):
                yield mounts / above, _SECOND
                yield mounts / "unified" / above, _SECOND
        elif "memory" in controllers.split(","):
            for above in (inner, *inner.parents):
                yield mounts / "memory" / above, _FIRST
