"""Sequences in rows: whatever they share, each token sees its own sequence up to itself, and nothing is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.evaluate.packing import Batch, alike, batches, common, pack

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


@settings(max_examples=60)
@given(SEQUENCES, st.integers(1, 60), st.floats(0.5, 500), st.integers(1, 12), st.integers(1, 9))
def test_every_token_sees_what_leads_to_it_and_nothing_else(sequences, tokens, balance, longest, most):
    seen = []
    for rows in batches(
        sequences, tokens=tokens, balance=balance, longest_row=longest, sequences_at_once=most
    ):
        batch = Batch.of(rows)
        assert batch.tokens.size <= tokens or len(rows) == 1
        assert len(batch.paths) <= most
        length = batch.tokens.shape[1]
        assert (batch.sees is None) == all(len(row.paths) == 1 for row in rows)
        sees = np.tri(length, dtype=bool)[None].repeat(len(rows), 0) if batch.sees is None else batch.sees
        for number, path in batch.paths.items():
            seen.append(number)
            assert batch.tokens.ravel()[path].tolist() == sequences[number]
            row, places = path[0] // length, path % length
            assert (path // length == row).all()
            assert batch.positions[row, places].tolist() == list(range(len(path)))
            for depth, place in enumerate(places):
                assert np.flatnonzero(sees[row, place]).tolist() == sorted(places[: depth + 1])
    assert sorted(seen) == list(range(len(sequences)))


def test_a_question_is_written_once_for_all_its_options():
    question = list(range(100, 150))
    rows = pack([[*question, option, 7] for option in range(4)], balance=1000.0)
    assert [len(row.tokens) for row in rows] == [len(question) + 4 * 2]


def test_what_is_not_shared_is_not_put_into_one_row():
    rows = pack([[number] * 30 for number in range(5)], balance=1000.0)
    assert len(rows) == 5


def test_attention_that_costs_more_than_is_saved_keeps_sequences_apart():
    alike = [[9, 9, *[number] * 300] for number in range(4)]
    assert len(pack(alike, balance=10.0)) == 4
    assert len(pack([[9] * 300 + [number] for number in range(4)], balance=10.0)) == 1


def test_common_beginnings():
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([1, 2], [1, 2, 3]) == 2
    assert common([5], [6]) == 0


def test_a_batch_is_cut_where_padding_would_cost_more_than_a_pass():
    (rows,) = batches([[n] * length for n, length in enumerate((9, 8, 8, 5, 5, 1))], tokens=100, balance=1e9)
    parts = list(alike(rows, pass_costs=2))
    assert [[len(row.tokens) for row in part] for part in parts] == [[9, 8, 8], [5, 5], [1]]
    assert [row for part in parts for row in part] == rows
