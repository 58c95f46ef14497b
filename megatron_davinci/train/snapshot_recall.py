"""Finding a run's snapshot in the memory of its nodes, and computing again what a lost node held."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_davinci.platform import parity
from megatron_davinci.platform.distributed import broadcast_object
from megatron_davinci.platform.snapshot_memory import Keeper, Part, RankMemory, digest_of
from megatron_davinci.train.snapshot_choice import Candidate, Held, candidates, rebuildable, why_not
from megatron_davinci.train.snapshot_names import memory_name, rank_of
from megatron_davinci.train.snapshot_state import described

_CHUNK = 256 << 20


@dataclass(frozen=True)
class Recalled:
    """A snapshot that every rank has its part of.

    Attributes:
        step: After which step it was taken.
        description: The position of the run, as rank 0 noted it.
        data: [bytes] uint8, this rank's state.
        slot: Where in this rank's own memory it is; None where it came from other nodes.
        rebuilt: The ranks whose states were computed from parity.
    """

    step: int
    description: dict[str, Any]
    data: np.ndarray
    slot: int | None
    rebuilt: list[int]


class Recall:
    """What the nodes' memory holds of a run. Every rank makes one and calls its methods together.

    Args:
        keeper: Of this rank's node.
        node: The node.
        kind: Digest of all that must be equal.
        timeout: How long ranks wait for each other.

    Attributes:
        messages: What there is to say of snapshots that were passed over.
    """

    def __init__(self, keeper: Keeper, node: str, kind: str, timeout: timedelta) -> None:
        self._kind, self._rank, self._world = kind, dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        self.messages: list[str] = []
        ranks = [rank for name in keeper.names() if (rank := rank_of(name)) is not None]
        here = (node, ranks)
        nodes = gathered(here)
        self._memory: dict[int, RankMemory] = {}
        local = [rank for rank, (other, _) in enumerate(nodes) if other == node]
        for owner in here[1]:
            reader = owner if owner in local else local[0]
            if reader == self._rank and (descriptor := keeper.get(memory_name(owner))) is not None:
                try:
                    self._memory[owner] = RankMemory(descriptor)
                except ValueError:
                    os.close(descriptor)
        self._held = [one for several in gathered(list(self._marked())) for one in several]

    @property
    def own(self) -> RankMemory | None:
        """This rank's own memory, as an earlier start left it on this node."""
        return self._memory.get(self._rank)

    def strangers(self) -> list[str]:
        """Names of memory on this node that ranks of other nodes have left; this rank has opened it."""
        return [memory_name(owner) for owner in self._memory if owner != self._rank]

    def find(self, problem_of: Callable[[dict[str, Any]], str | None]) -> Recalled | None:
        """The newest step that every rank has whole, or can have from parity.

        Args:
            problem_of: Says on rank 0 why the run cannot go on from a position; None where it can.
        """
        others = [one for one in self._held if one.kind != self._kind]
        found = candidates(self._held, self._kind)
        if others and not found:
            self.messages.append(
                "Snapshots in memory are of another layout, model, precision, moments or version "
                f"({others[0].layout}); only the same can go on from them."
            )
        for candidate in found:
            recalled, problem = self._recall(candidate)
            if recalled is not None:
                problem = broadcast_object(problem_of(recalled.description) if self._rank == 0 else None)
                if problem is None:
                    return recalled
            self.messages.append(
                f"The snapshot in memory of step {candidate.step:,} was passed over: {problem}."
            )
        return None

    def close(self, *, keep_own: bool) -> None:
        """Let go of the memory that was opened; of this rank's own one too, unless it is taken over."""
        for owner, memory in self._memory.items():
            if not (keep_own and owner == self._rank):
                memory.close()
        self._memory.clear()

    def _marked(self) -> Iterator[Held]:
        for owner, memory in self._memory.items():
            for slot in (0, 1):
                data, parity_ = memory.read(slot, "data"), memory.read(slot, "parity")
                if data is None:
                    continue
                yield Held(
                    owner=owner,
                    reader=self._rank,
                    slot=slot,
                    step=data["step"],
                    start=data["start"],
                    kind=data["kind"],
                    layout=data["layout"],
                    group=tuple(data["group"]),
                    data_bytes=memory.data_bytes,
                    parity_bytes=memory.parity_bytes if parity_ is not None else 0,
                    digests=tuple(parity_["digests"]) if parity_ is not None else (),
                )

    def _recall(self, candidate: Candidate) -> tuple[Recalled | None, str | None]:
        whole = self._whole(candidate, "data", range(self._world))
        others: set[int] = set()
        if len(whole) < self._world:
            others = self._whole(candidate, "parity", whole)
        lost = rebuildable(candidate, self._world, whole, others)
        if lost is None:
            return None, why_not(candidate, self._world, whole)
        data, parity_ = self._fetched(candidate, lost)
        good, members = True, gloo_group(sorted(set(lost.values())), self._timeout)
        for rank, group in lost.items():
            if self._rank not in group:
                continue
            slots = [candidate.slots[other] for other in group if other != rank]
            if rank == self._rank:
                data = np.zeros(slots[0].data_bytes, dtype=np.uint8)
                parity_ = np.zeros(slots[0].parity_bytes, dtype=np.uint8)
            parity.restore(group.index(rank), data, parity_, members)
            if rank == self._rank:
                good = digest_of(data) == slots[0].digests[group.index(rank)]
        if members is not None:
            dist.destroy_process_group(members)
        if not all(gathered(good)):
            return None, "what parity gives for a lost node does not have its digest"
        slot = candidate.slots[self._rank].slot if self._is_own(candidate, self._rank, lost) else None
        description = broadcast_object(described(data) if self._rank == 0 else None)
        return Recalled(candidate.step, description, data, slot, sorted(lost)), None

    def _is_own(self, candidate: Candidate, rank: int, lost: dict[int, tuple[int, ...]]) -> bool:
        return rank not in lost and candidate.slots[rank].reader == rank

    def _whole(self, candidate: Candidate, part: Part, of: Iterable[int]) -> set[int]:
        """The ranks of `of` whose region has its digest, as those found that can read it."""
        good = []
        for rank in of:
            one = candidate.slots.get(rank)
            if one is not None and one.reader == self._rank:
                memory = self._memory[rank]
                record = memory.read(one.slot, part)
                if record is None:
                    continue
                region = memory.region(one.slot, part)
                if digest_of(region) == record["digest"]:
                    good.append(rank)
        return {rank for several in gathered(good) for rank in several}

    def _fetched(
        self, candidate: Candidate, lost: dict[int, tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """This rank's state and parity: from its own memory, or from the rank whose node has it."""
        found = (np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.uint8))
        moved = [
            one for rank, one in sorted(candidate.slots.items()) if rank not in lost and one.reader != rank
        ]
        if self._is_own(candidate, self._rank, lost):
            slot = candidate.slots[self._rank].slot
            memory = self._memory[self._rank]
            found = memory.region(slot, "data"), memory.region(slot, "parity")
        if not moved:
            return found
        group = gloo_group([range(self._world)], self._timeout)
        for one in moved:
            if one.reader == self._rank:
                memory = self._memory[one.owner]
                _send(memory.region(one.slot, "data"), one.owner, group)
                _send(memory.region(one.slot, "parity")[: one.parity_bytes], one.owner, group)
            elif one.owner == self._rank:
                found = np.empty(one.data_bytes, np.uint8), np.empty(one.parity_bytes, np.uint8)
                for region in found:
                    _receive(region, one.reader, group)
        dist.destroy_process_group(group)
        return found


def gloo_group(groups: Sequence[Sequence[int]], timeout: timedelta) -> Any:
    """Make groups for host memory, whatever the run's own are for; every rank calls this.

    Returns:
        The group that this rank is in, which must be one at the most; None without.
    """
    own = None
    for ranks in groups:
        made = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            own = made
    return own


def gathered(value: Any) -> list[Any]:
    """What each rank has, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _send(region: np.ndarray, to: int, group: Any) -> None:
    for begin in range(0, region.nbytes, _CHUNK):
        dist.send(torch.from_numpy(region[begin : begin + _CHUNK]), dst=to, group=group)


def _receive(region: np.ndarray, source: int, group: Any) -> None:
    for begin in range(0, region.nbytes, _CHUNK):
        dist.recv(torch.from_numpy(region[begin : begin + _CHUNK]), src=source, group=group)
