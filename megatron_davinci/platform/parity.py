"""Parity over nodes: what one node held is computed again from what the others hold.

RAIM5 of REFT (arXiv 2310.12670), which is RAID-5 over the memory of machines. The `n` members of a group are ranks on
`n` different nodes. A member's data is cut into `n - 1` pieces, one for each other member; member `s` holds

    parity_s = XOR over i != s of piece(i, s)

so each byte of parity is on another node than the data that it is of, every member holds equally much of both, and
parity takes 1 / (n - 1) of the data. Without member `m`, for each other member `s`

    piece(m, s) = parity_s XOR (XOR over i != s, m of piece(i, s))

which is the same sum, with parity in m's place: one exchange serves both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_CHUNK = 4 << 20
_ALIGN = 64


class Aborted(Exception):
    """Nobody waits for the result any more."""


def parity_groups(nodes: Sequence[str], largest: int) -> list[list[int]]:
    """Which ranks hold parity for each other.

    Neighbouring nodes are put together: in Megatron-Core's order of ranks they mostly hold the same stage of the
    pipeline, and ranks of the same place on them are of one data-parallel group, with equally much data.

    Args:
        nodes: The node of each rank.
        largest: Nodes of the largest group; with 2 and an odd number of nodes one group is of 3. One node of each
            group may be lost.

    Returns:
        Groups of ranks, every two of a group on different nodes; each rank is in exactly one. A rank that is alone
        in its group has no parity.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    members = list(by_node.values())
    count = -(-len(members) // largest)
    # Three together rather than one of them alone, whom nobody could help.
    count = max(1, min(count, len(members) // 2))
    groups = []
    for number in range(count):
        # As equal as they can be: none is left with one node alone.
        part = members[number * len(members) // count : (number + 1) * len(members) // count]
        for place in range(max(map(len, part))):
            groups.append([ranks[place] for ranks in part if place < len(ranks)])
    return sorted(groups)


def piece_bytes(longest: int, members: int) -> int:
    """Bytes of a piece, and of each member's parity, where the longest data of the group are `longest` bytes."""
    return -(-longest // ((members - 1) * _ALIGN)) * _ALIGN


def exchange(
    pieces: np.ndarray, total: np.ndarray, group: Any, aborted: Callable[[], bool] = lambda: False
) -> None:
    """Add, by XOR, the other members' pieces for this one to `total`. Every member of the group calls this.

    Args:
        pieces: [(n - 1) * piece] uint8, this member's data, padded.
        total: [piece] uint8: zeros to compute parity; parity to compute the pieces of a member whose own are zeros.
        group: A gloo group.
        aborted: Asked while waiting for the others.

    Raises:
        Aborted: `aborted` said so.
        RuntimeError: Another member has gone.
    """
    members, own = dist.get_world_size(group), dist.get_rank(group)
    if members == 1:
        return
    cut = torch.from_numpy(pieces.reshape(members - 1, len(total)))
    summed = torch.from_numpy(total)
    others = [member for member in range(members) if member != own]
    step = min(_CHUNK, len(total))
    sent = torch.zeros((members, step), dtype=torch.uint8)
    received = torch.empty_like(sent)
    for begin in range(0, len(total), step):
        size = min(step, len(total) - begin)
        out, into = sent.view(-1)[: members * size], received.view(-1)[: members * size]
        out = out.view(members, size)
        for place, member in enumerate(others):
            out[member].copy_(cut[place, begin : begin + size])
        out[own].zero_()
        _wait(
            dist.all_to_all_single(into, out.reshape(-1), group=group, async_op=True),
            aborted,
        )
        for member in others:
            summed[begin : begin + size].bitwise_xor_(into.view(members, size)[member])


def gather(value: bytes, group: Any, aborted: Callable[[], bool] = lambda: False) -> list[bytes]:
    """What each member of the group has, all of one length."""
    own = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    _wait(dist.all_gather(found, own, group=group, async_op=True), aborted)
    return [one.numpy().tobytes() for one in found]


def restore(lost: int, pieces: np.ndarray, parity: np.ndarray, group: Any) -> None:
    """Compute the data of a member that has lost its own. Every member of the group calls this.

    Args:
        lost: Its place in the group.
        pieces: [(n - 1) * piece] uint8, this member's data, padded; where it has lost them, they are written here.
        parity: [piece] uint8, this member's parity; the lost member's is not used.
        group: A gloo group.
    """
    own = dist.get_rank(group)
    if own == lost:
        pieces[:] = 0
    total = parity.copy()
    exchange(pieces, total, group)
    members = [member for member in range(dist.get_world_size(group)) if member != lost]
    if own == lost:
        cut = torch.from_numpy(pieces.reshape(len(members), len(parity)))
        for place, member in enumerate(members):
            dist.recv(cut[place], src=dist.get_global_rank(group, member), group=group)
    else:
        dist.send(torch.from_numpy(total), dst=dist.get_global_rank(group, lost), group=group)


def _wait(work: Any, aborted: Callable[[], bool]) -> None:
    """Wait in small sleeps, so that a thread that nobody waits for ends, whatever the others do."""
    pause = 1e-4
    while not work.is_completed():
        if aborted():
            raise Aborted
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)
    work.wait()
