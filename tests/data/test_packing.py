"""Best-fit packing: every token once, nothing too long, few sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data.packing import best_fit
from tests.cases import cases


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 17))
@cases(200)
def test_every_token_is_in_one_sequence_and_none_is_too_long(lengths: list[int], length: int) -> None:
    packed = best_fit(np.array(lengths, np.int64), length)
    covered = sorted(
        (document, token)
        for document, start, count in zip(packed.document, packed.start, packed.length)
        for token in range(start, start + count)
    )
    assert covered == [(document, token) for document, n in enumerate(lengths) for token in range(n)]
    used = np.bincount(packed.sequence, packed.length, packed.sequences)
    assert packed.sequences == len(used) and (used <= length).all() and (used > 0).all()
    assert (np.diff(packed.sequence) >= 0).all()
    # A document is cut only into full sequences and a rest.
    assert all(count == length or start + count == lengths[document]
               for document, start, count in zip(packed.document, packed.start, packed.length))  # fmt: skip
    # Two sequences that would fit into one are not left.
    if packed.sequences > 1:
        two = np.sort(used)[:2]
        assert two.sum() > length
    # Sequences come in the order of their earliest document.
    first = [packed.document[packed.sequence == s].min() for s in range(packed.sequences)]
    assert first == sorted(first)


def test_the_tightest_room_is_taken() -> None:
    packed = best_fit(np.array([6, 7, 3, 4]), 10)
    rooms = {s: sorted(packed.document[packed.sequence == s].tolist()) for s in range(packed.sequences)}
    assert rooms == {0: [0, 3], 1: [1, 2]}


def test_short_documents_are_hardly_ever_cut() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int64) + 1
    packed = best_fit(lengths, 2048)
    assert packed.sequences * 2048 < 1.01 * lengths.sum()
    cut = np.bincount(packed.document)[lengths <= 2048]
    assert (cut == 1).all()
