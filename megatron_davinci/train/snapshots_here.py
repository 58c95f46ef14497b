"""What this machine's memory still holds of a run's snapshots, for whoever asks why it has ended. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from megatron_davinci.config.snapshots import SnapshotsConfig
from megatron_davinci.errors import DavinciError
from megatron_davinci.platform.snapshot_memory import Keeper, RankMemory, boot_id, keeper_address
from megatron_davinci.train.snapshot_names import identity, memory_name, rank_of

_MOST_NODES = 64
"""Parts of this machine that are looked at where a run counts each as a node of its own."""


@dataclass(frozen=True)
class HeldHere:
    """A snapshot as far as it is on this machine.

    Attributes:
        step: After which step it was taken.
        ranks: Whose parts are here, rising.
    """

    step: int
    ranks: list[int]


def held_here(run: Path, settings: SnapshotsConfig) -> list[HeldHere]:
    """The snapshots of a run that processes of this machine keep, newest first. Nothing of them is changed.

    Their bytes are not compared with their digests, which a start does. A keeper that waits for its run to come back
    waits its time from now on.

    Args:
        run: The run directory.
        settings: The section `snapshots`.
    """
    name = identity(run)
    if name is None:
        return []
    found: dict[int, set[int]] = defaultdict(set)
    nodes = [boot_id()]
    if settings.ranks_per_node is not None:
        nodes = [f"{boot_id()}/{number}" for number in range(_MOST_NODES)]
    for node in nodes:
        with contextlib.suppress(DavinciError, OSError, ValueError):
            _look(keeper_address(name, node), settings.keep_alive_seconds, found)
    return [HeldHere(step, sorted(found[step])) for step in sorted(found, reverse=True)]


def _look(address: str, keep_alive: float, found: dict[int, set[int]]) -> None:
    keeper = Keeper(address, keep_alive, start=False)
    try:
        for rank in [rank for name in keeper.names() if (rank := rank_of(name)) is not None]:
            descriptor = keeper.get(memory_name(rank))
            if descriptor is None:
                continue
            try:
                memory = RankMemory(descriptor)
            except ValueError:
                os.close(descriptor)
                continue
            for slot in (0, 1):
                record = memory.read(slot, "data")
                if record is not None:
                    found[int(record["step"])].add(rank)
            memory.close()
    finally:
        keeper.close()
