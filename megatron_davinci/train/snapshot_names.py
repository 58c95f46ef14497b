"""What a run's snapshots are called: the run, the node, each rank's memory. Needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_davinci.config.snapshots import SnapshotsConfig
from megatron_davinci.platform.snapshot_memory import boot_id

_NAME = "rank-"


def identity(directory: Path) -> str | None:
    """What tells a run from another one in the same place; None before it has begun."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        return f"{os.path.realpath(directory)}\0{manifest['created']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def node_here(settings: SnapshotsConfig) -> str:
    """What is lost together with this rank: its machine, or a part of the machine's ranks."""
    if settings.ranks_per_node is None:
        return boot_id()
    return f"{boot_id()}/{int(os.environ.get('LOCAL_RANK', '0')) // settings.ranks_per_node}"


def memory_name(rank: int) -> str:
    """What the keeper holds a rank's memory under."""
    return f"{_NAME}{rank}"


def rank_of(name: str) -> int | None:
    """Whose memory is held under a name; None where it is something else."""
    number = name.removeprefix(_NAME)
    return int(number) if name.startswith(_NAME) and number.isdecimal() else None
