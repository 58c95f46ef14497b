"""Parity: whichever one node of a group is lost, the others have all that it had."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.platform.parity import parity_groups, piece_bytes
from tests.ranks import run_ranks


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(2, 9))
def test_groups_hold_every_rank_once_and_no_node_twice(placed, largest):
    nodes = [str(node) for node in placed]
    groups = parity_groups(nodes, largest)
    assert sorted(rank for group in groups for rank in group) == list(range(len(nodes)))
    for group in groups:
        odd_pairs = largest == 2 and len(set(nodes)) % 2
        assert len({nodes[rank] for rank in group}) == len(group) <= largest + odd_pairs
    # With equally many ranks on each of several nodes, nobody is alone.
    if len(set(nodes)) > 1 and len({nodes.count(node) for node in nodes}) == 1:
        assert min(map(len, groups)) >= 2


def test_groups_of_a_cluster_are_of_neighbouring_nodes_and_equal():
    nodes = [f"n{rank // 2}" for rank in range(20)]
    assert parity_groups(nodes, 4) == [
        [0, 2, 4],
        [1, 3, 5],
        [6, 8, 10],
        [7, 9, 11],
        [12, 14, 16, 18],
        [13, 15, 17, 19],
    ]
    assert parity_groups(["one"] * 3, 8) == [[0], [1], [2]]


@given(st.integers(1, 10**7), st.integers(2, 9))
def test_parity_takes_one_share_of_the_data(longest, members):
    piece = piece_bytes(longest, members)
    assert 0 <= piece * (members - 1) - longest < 64 * (members - 1)


def lose_each(sizes, damage):
    """On each rank: whether its data came back after each member was lost in turn, and a wrong parity's answer."""
    import torch.distributed as dist

    from megatron_davinci.platform import parity

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    answers = []
    for number, longest in enumerate(sizes):
        piece = parity.piece_bytes(longest, world)
        data = np.zeros(piece * (world - 1), dtype=np.uint8)
        own = max(1, longest - rank * (longest // 7))  # stages of a pipeline have different sizes
        data[:own] = np.random.default_rng([number, rank]).integers(0, 256, own)
        held = np.zeros(piece, dtype=np.uint8)
        parity.exchange(data, held, dist.group.WORLD)
        digests = parity.gather(bytes([rank]) * 16, dist.group.WORLD)
        assert digests == [bytes([member]) * 16 for member in range(world)]
        for lost in range(world):
            left, left_parity = data.copy(), held.copy()
            if rank == lost:
                left[:], left_parity[:] = 99, 99
            elif damage and rank == (lost + 1) % world:
                left_parity[0] ^= 1
            parity.restore(lost, left, left_parity, dist.group.WORLD)
            answers.append(bool((left == data).all()))
    dist.destroy_process_group()
    return answers


def test_every_member_is_computed_again_from_the_others():
    # One byte, less than a piece, an odd number, and more than is exchanged at once.
    assert all(all(answers) for answers in run_ranks(3, lose_each, [1, 63, 100_003, 9_000_000], False))


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4, 5])
def test_groups_of_other_sizes(world):
    assert all(all(answers) for answers in run_ranks(world, lose_each, [1, 100_003, 17_000_000], False))


def test_the_check_would_find_a_wrong_bit():
    answers = run_ranks(3, lose_each, [1000], True)
    assert [answers[rank][rank] for rank in range(3)] == [False, False, False]
