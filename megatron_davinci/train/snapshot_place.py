"""Where a run's snapshots are: of which run and node, who holds parity with whom, and the memory for them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_davinci.config import Layout, RunConfig
from megatron_davinci.config.snapshots import SnapshotsConfig
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.platform import parity
from megatron_davinci.platform.available_memory import available_bytes
from megatron_davinci.platform.snapshot_memory import Keeper, RankMemory, boot_id, memory_bytes
from megatron_davinci.train.snapshot_names import memory_name
from megatron_davinci.train.snapshot_recall import gathered
from megatron_davinci.version import __version__

_NAMED = 4
"""Nodes or ranks that a message names."""


def kind_of(config: RunConfig, layout: Layout) -> str:
    """A digest of all that must be equal for the bytes of a snapshot to be a rank's state."""
    facts = {
        "format": 1,
        "layout": asdict(layout),
        "parallel": config.parallel.model_dump(mode="json", exclude={"timeout_seconds"}),
        "model": config.model.model_dump(mode="json"),
        "no_weight_decay": config.optimizer.no_weight_decay,
        "moments": config.optimizer.moments,
        "optimizer": config.optimizer.kind,
        "precision": config.train.precision,
        "versions": [__version__, importlib.metadata.version("megatron-core"), torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def groups_of(nodes: Sequence[str], settings: SnapshotsConfig) -> list[list[int]]:
    """Which ranks hold parity for each other.

    Args:
        nodes: The node of each rank.
        settings: The section.

    Raises:
        EnvironmentProblem: Parity is a must, and there is one node.
    """
    if settings.parity == "never":
        return [[rank] for rank in range(len(nodes))]
    groups = parity.parity_groups(nodes, settings.parity_nodes)
    if settings.parity == "always" and min(map(len, groups)) == 1:
        raise EnvironmentProblem(
            "Parity of snapshots needs each rank to have a partner on another node.",
            where="snapshots.parity: always",
            found=f"{len(nodes)} ranks on {len(set(nodes))} node{'s' if len(set(nodes)) > 1 else ''}",
            do="start the run on several nodes with equally many ranks, set snapshots.parity to auto, or, to try it "
            "out on one machine, set snapshots.ranks_per_node",
        )
    return groups


def take_memory(keeper: Keeper, left: RankMemory | None, group_bytes: Sequence[int]) -> RankMemory:
    """Have the memory of this rank's two slots, held by the keeper; every rank calls this.

    Args:
        keeper: Of this node.
        left: What an earlier start has left. It is taken over if it is of the size.
        group_bytes: The state of each member of the rank's parity group, in bytes.

    Raises:
        EnvironmentProblem: A node does not have it.
    """
    rank, members = dist.get_rank(), len(group_bytes)
    piece = parity.piece_bytes(max(group_bytes), members) if members > 1 else 0
    data = piece * (members - 1) if members > 1 else group_bytes[0]
    if left is not None and (left.data_bytes, left.parity_bytes) != (data, piece):
        keeper.drop([memory_name(rank)])
        left = None
    needed = 0 if left is not None else memory_bytes(data, piece)
    _check_available(needed)
    memory, problem = left, None
    if memory is None:
        try:
            memory = RankMemory.create(data, piece)
        except OSError as error:
            problem = f"rank {rank} on {socket.gethostname()}: {error.strerror or error}"
    problems = [one for one in gathered(problem) if one]
    if memory is None or problems:
        raise EnvironmentProblem(
            "Host memory for snapshots could not be had.",
            where="snapshots.every_steps",
            found="\n".join(problems[:_NAMED]),
            expected=f"{needed:,} bytes a rank",
            do="give the run more memory, or set snapshots.every_steps to null",
        )
    keeper.put(memory_name(rank), memory.descriptor)
    return memory


def _check_available(needed: int) -> None:
    """Refuse before the first step what would be killed for want of memory later."""
    ranks = gathered((boot_id(), socket.gethostname(), needed, available_bytes()))
    short = []
    for machine in dict.fromkeys(machine for machine, *_ in ranks):
        here = [(host, need, free) for other, host, need, free in ranks if other == machine]
        need, free = sum(need for _, need, _ in here), min(free for _, _, free in here)
        if need > free:
            short.append(f"{here[0][0]}: {free / 1e9:.3g} GB available, {need / 1e9:.3g} GB needed")
    if short:
        raise EnvironmentProblem(
            "There is not enough host memory for snapshots.",
            where="snapshots.every_steps",
            found="\n".join(short[:_NAMED]),
            expected="twice the optimizer state of a node's ranks, and parity",
            do="give the nodes more memory, shard the optimizer over more ranks, or set snapshots.every_steps "
            "to null",
        )
