"""How much memory of the host a process may still take."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from megatron_davinci.platform.control_groups import groups

# A group's limit, what it has in use, and the line of `memory.stat` that says how much of that was read from files.
_SECOND = ("memory.max", "memory.current", "inactive_file")
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this machine, or this container, has left without taking it from anybody.

    Args:
        root: Where `proc` and `sys` are.
    """
    left = [int(psutil.virtual_memory().available)]
    for group, version in groups(root, "memory"):
        limit, used, cached = _SECOND if version == 2 else _FIRST
        # A group without a limit, or one that is not shown to this process, holds nothing back.
        with contextlib.suppress(OSError, ValueError, StopIteration):
            room = int((group / limit).read_text()) - int((group / used).read_text())
            # What was read from files counts as used, and goes where memory is wanted.
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(room + next(int(value) for name, value in lines if name == cached))
    return max(0, min(left))
