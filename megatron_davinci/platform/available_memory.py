"""How much memory of the host a process may still take."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def available_bytes() -> int:
    """Memory that this machine, or this container, has left without taking it from anybody."""
    found = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        # What was read from files counts as used, and goes where memory is wanted.
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = next(int(value) for name, value in lines if name == "inactive_file")
        found = min(found, limit - used + cached)
    return max(0, found)
