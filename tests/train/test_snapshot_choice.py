"""The step that a run goes on from is the newest that every rank has, or can have from parity."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.train.snapshot_choice import Held, candidates, rebuildable, why_not

KIND = "k"
GROUPS = {1: [[0, 1, 2, 3]], 2: [[0, 2], [1, 3]], 4: [[0], [1], [2], [3]]}


def held(owner, step, group, *, start="s", kind=KIND, reader=None, parity=8):
    return Held(
        owner=owner,
        reader=owner if reader is None else reader,
        slot=step % 2,
        step=step,
        start=start,
        kind=kind,
        layout="TP1 x PP1 x DP4 = 4 ranks",
        group=tuple(group),
        data_bytes=24,
        parity_bytes=parity if len(group) > 1 else 0,
        digests=("d",) * len(group) if len(group) > 1 and parity else (),
    )


def group_of(rank, groups):
    return next(group for group in groups if rank in group)


def choose(slots, world=4, damaged=(), no_parity=()):
    """The step that a run would go on from, as `Recall` asks for it."""
    for candidate in candidates(slots, KIND):
        whole = {rank for rank in candidate.slots if (rank, candidate.step) not in damaged}
        parity = {rank for rank in whole if (rank, candidate.step) not in no_parity}
        lost = rebuildable(candidate, world, whole, parity)
        if lost is not None:
            return candidate.step, sorted(lost)
    return None


@given(
    st.sampled_from(sorted(GROUPS)),
    st.sets(st.tuples(st.integers(0, 3), st.sampled_from([10, 20]))),
    st.sets(st.tuples(st.integers(0, 3), st.sampled_from([10, 20]))),
    st.sets(st.tuples(st.integers(0, 3), st.sampled_from([10, 20]))),
)
def test_the_choice_is_that_of_trying_every_step(number, absent, damaged, no_parity):
    groups = GROUPS[number]
    slots = [
        held(rank, step, group_of(rank, groups))
        for rank in range(4)
        for step in (10, 20)
        if (rank, step) not in absent
    ]

    def goes(step):
        bad = {rank for rank in range(4) if (rank, step) in absent | damaged}
        for group in groups:
            lost = bad & set(group)
            others = set(group) - lost
            if len(lost) > 1 or (lost and (not others or any((rank, step) in no_parity for rank in others))):
                return None
        return step, sorted(bad)

    expected = next((answer for answer in (goes(20), goes(10)) if answer), None)
    assert choose(slots, damaged=damaged, no_parity=no_parity) == expected


def test_a_rank_that_is_a_step_behind_takes_all_back():
    whole = [held(rank, step, [rank]) for rank in range(4) for step in (10, 20)]
    assert choose(whole) == (20, [])
    assert choose([one for one in whole if (one.owner, one.step) != (2, 20)]) == (10, [])


def test_steps_of_two_starts_are_not_mixed():
    mixed = [held(rank, 20, [rank], start="first" if rank < 2 else "second") for rank in range(4)]
    assert choose(mixed) is None
    assert choose(mixed + [held(rank, 10, [rank], start="first") for rank in range(4)]) == (10, [])


def test_another_layout_is_left_out():
    assert candidates([held(rank, 20, [rank], kind="other") for rank in range(4)], KIND) == []


def test_a_ranks_own_node_is_asked_before_another_that_has_it_too():
    stranger, own = held(1, 20, [1], reader=0), held(1, 20, [1])
    for order in ([stranger, own], [own, stranger]):
        assert candidates(order, KIND)[0].slots[1].reader == 1
    assert candidates([stranger], KIND)[0].slots[1].reader == 0


def test_why_not_names_the_ranks():
    slots = [held(rank, 20, [0, 1, 2, 3]) for rank in (0, 1)]
    (candidate,) = candidates(slots, KIND)
    assert why_not(candidate, 4, whole=[0]) == (
        "nothing is left of rank 2, 3; the digest does not match of rank 1, and parity makes up for one lost node "
        "of a group"
    )
    (candidate,) = candidates([replace(one, parity_bytes=0) for one in slots], KIND)
    assert why_not(candidate, 4, whole=[0, 1]) == "nothing is left of rank 2, 3, and there is no parity"
