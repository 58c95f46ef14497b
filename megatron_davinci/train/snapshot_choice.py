"""Which snapshot a run can go on from: a function of what the nodes' memory holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """One slot, as its marks have it.

    Attributes:
        owner: The rank whose state it is.
        reader: The rank that can read it: the owner, unless it is on another node now.
        slot: Which of the memory's slots.
        step: After which step it was taken.
        start: Of the run, which took it: two starts may have come to one step by different ways.
        kind: Digest of all that must be equal to go on from it.
        layout: For people.
        group: The ranks that hold parity for each other, the owner among them.
        data_bytes: Of the region that the state is in.
        parity_bytes: 0 where it has no parity.
        digests: Of each member's state, in the order of the group; empty without parity.
    """

    owner: int
    reader: int
    slot: int
    step: int
    start: str
    kind: str
    layout: str
    group: tuple[int, ...]
    data_bytes: int
    parity_bytes: int
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A step that slots of one start are of.

    Attributes:
        step: The step.
        start: The start.
        slots: By owner, at most one each.
    """

    step: int
    start: str
    slots: Mapping[int, Held]


def candidates(held: Iterable[Held], kind: str) -> list[Candidate]:
    """The steps that the slots are of, the newest first; slots of another kind are left out."""
    by_step: dict[tuple[int, str], dict[int, Held]] = {}
    for one in held:
        if one.kind != kind:
            continue
        slots = by_step.setdefault((one.step, one.start), {})
        # Where a rank has moved to another node, an old one may hold it too. Its own node's is at hand.
        if one.owner not in slots or one.reader == one.owner:
            slots[one.owner] = one
    return [Candidate(*key, slots) for key, slots in sorted(by_step.items(), reverse=True)]


def rebuildable(
    candidate: Candidate, world: int, whole: Collection[int], parity: Collection[int]
) -> dict[int, tuple[int, ...]] | None:
    """Which ranks' states have to be computed from parity, and from which group each.

    Args:
        candidate: The step.
        world: Ranks of the run.
        whole: Ranks whose state is there and has its digest.
        parity: Ranks whose parity is there and has its digest.

    Returns:
        By rank, its group; empty where every state is there. None where a state is lost for good: it is of no group
        with parity, or another member of its group has lost its own too.
    """
    groups = {one.group for one in candidate.slots.values() if one.parity_bytes}
    lost: dict[int, tuple[int, ...]] = {}
    for rank in range(world):
        if rank in whole:
            continue
        group = next((group for group in groups if rank in group), None)
        if group is None or not all(other in whole and other in parity for other in group if other != rank):
            return None
        lost[rank] = group
    return lost


def why_not(candidate: Candidate, world: int, whole: Collection[int]) -> str:
    """Why a step cannot be gone on from."""
    absent = [rank for rank in range(world) if rank not in candidate.slots]
    damaged = [rank for rank in candidate.slots if rank not in whole]
    said = [
        f"{what} of rank {_listed(ranks)}"
        for what, ranks in (("nothing is left", absent), ("the digest does not match", damaged))
        if ranks
    ]
    with_parity = any(one.parity_bytes for one in candidate.slots.values())
    return "; ".join(said) + (
        ", and parity makes up for one lost node of a group" if with_parity else ", and there is no parity"
    )


def _listed(ranks: Sequence[int], most: int = 8) -> str:
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + more
