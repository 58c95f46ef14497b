"""Documents in a sequence: where they begin, and attention in pieces against the formula with a mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.documents import DocumentMask, Documents, document_starts
from megatron_davinci.model.pieces import cut
from tests.model.test_layers import a_config
from tests.ranks import run_ranks

HEADS, GROUPS, CHANNELS = 6, 2, 8


@st.composite
def micro_batches(draw):
    """Document ends [batch, length], and a number of context-parallel ranks that divides the length."""
    ranks = draw(st.integers(1, 3))
    length = draw(st.integers(1, 6)) * 2 * ranks
    batch = draw(st.integers(1, 3))
    bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    return np.array(bits).reshape(batch, length), ranks


def starts_one_by_one(ends: np.ndarray) -> np.ndarray:
    starts = np.zeros(ends.shape, np.int64)
    for row, row_ends in enumerate(ends):
        begin = 0
        for position, is_end in enumerate(row_ends):
            starts[row, position] = begin
            if is_end:
                begin = position + 1
    return starts


@given(micro_batches())
def test_a_document_begins_behind_the_end_of_the_one_before(case):
    ends, _ = case
    assert np.array_equal(document_starts(ends), starts_one_by_one(ends))


@given(micro_batches(), st.booleans())
def test_pieces_hold_each_query_once_with_all_that_it_sees_and_nothing_else(case, by_size):
    ends, ranks = case
    batch, length = ends.shape
    starts = starts_one_by_one(ends)
    where = np.empty((length, 2), np.int64)  # rank and place on it, of each position
    for rank in range(ranks):
        held = SequencePart(length, ranks, rank).take(torch.arange(length)[None])[0].numpy()
        where[held] = np.stack([np.full(len(held), rank), np.arange(len(held))], axis=1)
    seen = {}
    for rank in range(ranks):
        pieces = cut(starts, SequencePart(length, ranks, rank), torch.device("cpu"), by_size=by_size)
        tokens = torch.arange(length // ranks * batch)
        queries = pieces.queries.take(tokens)
        assert torch.equal(pieces.queries.put_back(queries), tokens)
        keys = pieces.keys.take(torch.arange(length * batch))
        assert torch.equal(gradient_of(pieces.keys, length * batch), keys.bincount(minlength=length * batch))
        bounds = zip(*(b.tolist() for b in (pieces.query_bounds, pieces.key_bounds)))
        sizes = [size[1:] for size in pieces.groups for _ in range(size[0])]
        (q0, k0), *rest = bounds
        assert (q0, k0) == (0, 0)
        for (q1, k1), size in zip(rest, sizes, strict=True):
            assert (q1 - q0, k1 - k0) == size
            assert q1 - q0 <= pieces.longest_queries and k1 - k0 <= pieces.longest_keys
            for n, query in enumerate(queries[q0:q1].tolist()):
                # Causal and aligned at the end.
                sees = keys[k0 : k1 - (q1 - q0) + n + 1].tolist()
                assert (rank, query) not in seen
                seen[rank, query] = sees
            q0, k0 = q1, k1
        assert (q0, k0) == (len(queries), len(keys))
    for row in range(batch):
        for position in range(length):
            rank, place = where[position]
            expected = [
                (where[p][0] * (length // ranks) + where[p][1]) * batch + row
                for p in range(starts[row, position], position + 1)
            ]
            assert seen.pop((rank, place * batch + row)) == expected
    assert not seen


def gradient_of(gather, tokens):
    """How often each of `tokens` is taken, by way of the gradient."""
    rows = torch.zeros(tokens, requires_grad=True)
    gather.take(rows).sum().backward()
    return rows.grad.long()


def test_as_many_keys_as_tokens_may_be_some_of_them_twice():
    # Rank 0 of 2 holds positions 0, 1 and 6, 7. In the first row both see 0 and 1; in the second nobody sees 2 and 3.
    starts = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 4, 4, 4, 4]])
    keys = cut(starts, SequencePart(8, 2, 0), torch.device("cpu"), by_size=False).keys
    assert len(keys.rows) == 16
    held = [0, 1, 6, 7, 2, 3, 4, 5]  # positions in the order of the ranks
    times = gradient_of(keys, 16).reshape(8, 2)
    assert dict(zip(held, times[:, 0].tolist())) == {p: 2 if p < 2 else 1 for p in range(8)}
    assert dict(zip(held, times[:, 1].tolist())) == {p: 0 if p in (2, 3) else 1 for p in range(8)}


def test_pieces_of_one_size_are_computed_together():
    # A tail of ends makes as many documents of one token, and they cost one call.
    ends = np.zeros((2, 16), bool)
    ends[:, 7:] = True
    part = SequencePart(16)
    pieces = cut(document_starts(ends), part, torch.device("cpu"), by_size=True)
    assert pieces.groups == ((16, 1, 1), (2, 8, 8))
    # As they lie, tokens need not be moved for one sequence.
    alone = cut(document_starts(ends[:1]), part, torch.device("cpu"), by_size=False)
    assert alone.queries.rows is None and alone.keys.rows is None
    assert alone.query_bounds.tolist() == [0, *range(8, 17)]


def test_a_sequence_that_is_one_document_is_plain_causal_attention():
    mask = DocumentMask(eod_id=9)
    part, device = SequencePart(4), torch.device("cpu")
    assert Documents.of(mask.ends(torch.tensor([[1, 2, 3, 4]])).numpy(), part, device) is None
    # An end at the last position begins nothing in this sequence.
    assert Documents.of(mask.ends(torch.tensor([[1, 2, 3, 9]])).numpy(), part, device) is None
    there = Documents.of(mask.ends(torch.tensor([[1, 9, 3, 4]])).numpy(), part, device)
    assert there is not None and there.starts.tolist() == [[0, 0, 2, 2]] and there.positions is None


@pytest.mark.parametrize("rank", [0, 1])
def test_positions_begin_at_0_in_every_document(rank):
    ends = np.array([[False, True, False, False, False, False, True, False]])
    found = Documents.of(ends, SequencePart(8, 2, rank), torch.device("cpu"), reset_positions=True)
    assert found is not None and found.positions is not None
    whole = [0, 1, 0, 1, 2, 3, 4, 0]
    held = [[0, 1, 6, 7], [2, 3, 4, 5]][rank]
    assert found.positions.tolist() == [[whole[p] for p in held]]


def reference(q, k, v, starts, dropped=0.0):
    """softmax(q k / sqrt(d)) v in float64 with the whole mask: [length, batch, heads * channels]."""
    length, batch = q.shape[:2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    position = torch.arange(length)
    visible = (position[None, None] <= position[None, :, None]) & (
        position[None, None] >= torch.from_numpy(starts)[:, :, None]
    )
    scores = (q @ k.transpose(2, 3) / math.sqrt(CHANNELS)).masked_fill(~visible[:, None], -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(length, batch, -1)


def plain_varlen(q, k, v, query_bounds, key_bounds, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What torch's varlen kernel computes, in plain torch and float64."""
    assert window_size == (-1, 0) and enable_gqa
    out, (q_ends, k_ends) = [], (query_bounds.tolist(), key_bounds.tolist())
    assert longest_q == max(np.diff(q_ends)) and longest_k == max(np.diff(k_ends))
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        keys, values = (x[k0:k1].double().repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        scores = torch.einsum("qnd,knd->nqk", q[q0:q1].double(), keys) * scale
        hidden = torch.ones(q1 - q0, k1 - k0).triu(1 + (k1 - k0) - (q1 - q0)).bool()
        out.append(
            torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -math.inf).softmax(-1), values).float()
        )
    return torch.cat(out)


def attention_in_documents():
    """Differences from the formula: piece by piece, and with a kernel that is given the pieces' bounds."""
    from megatron_davinci.model import attention

    here = differences_from_the_formula()
    attention.varlen_kernel = lambda query, dropout: plain_varlen
    return here, differences_from_the_formula()


def differences_from_the_formula():
    """Largest differences of output and gradients from the formula, over random documents on 1 to 3 ranks.

    The ranks' parts are gathered as the collective would, in this process.
    """
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_davinci.model import attention

    differences = []

    @settings(max_examples=30, database=None, derandomize=True, deadline=None)
    @given(micro_batches())
    def check(case):
        ends, ranks = case
        batch, length = ends.shape
        generator = torch.Generator().manual_seed(5)
        shapes = ((length, batch, HEADS, CHANNELS), *[(length, batch, GROUPS, CHANNELS)] * 2)
        ours = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        theirs = [x.detach().double().requires_grad_() for x in ours]
        expected = reference(*theirs, starts_one_by_one(ends))
        whole = [SequencePart(length, ranks, rank) for rank in range(ranks)]
        out = []
        for part in whole:
            held = [part.take(x, 0) for x in ours]
            attend = attention.SDPAttention(a_config(), 1, AttnMaskType.causal, "self").eval()
            if ranks > 1:
                attend.context_group = FakeGroup(part)
                both = torch.cat([torch.cat([p.take(x, 0) for p in whole]) for x in ours[1:]], dim=2)
                attention.gather_sequence = lambda part, group, both=both: both
            documents = Documents.of(ends, part, torch.device("cpu"))
            out.append(attend(*held, None, packed_seq_params=documents))
        wanted = torch.cat([part.take(expected, 0) for part in whole])
        found = torch.cat(out)
        weight = torch.randn(found.shape, generator=generator)
        (found * weight).sum().backward()
        (wanted * weight).sum().backward()
        differences.append(
            max(
                float((found - wanted).abs().max()),
                *(float((a.grad - b.grad).abs().max()) for a, b in zip(ours, theirs)),
            )
        )

    check()
    return differences


class FakeGroup:
    """As much of a process group as attention asks."""

    def __init__(self, part):
        self.part = part

    def size(self):
        return self.part.ranks

    def rank(self):
        return self.part.rank


def test_attention_in_documents_equals_the_formula_in_float64():
    for differences in run_ranks(1, attention_in_documents)[0]:
        assert len(differences) >= 30
        assert max(differences) < 1e-5
