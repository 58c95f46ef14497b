"""How many processors a process may keep busy."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

from megatron_davinci.platform.control_groups import groups


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, and that its time suffices for.

    A container that is given two processors' time (`docker run --cpus 2`, a limit of Kubernetes) sees all cores of
    the machine: as many threads would use the time up at once and then stand still until there is more.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        1 or more.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for group, version in groups(root, "cpu"):
        # A group without a limit, or one that is not shown to this process, holds nothing back.
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            if (time := int(quota)) > 0:
                cores = min(cores, time / int(period))
    return max(1, math.ceil(cores))
