"""Which samples are whose: a global batch is the same set on every layout."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.train.feed import rank_samples


@given(
    first=st.integers(0, 2**40),
    ranks=st.integers(1, 16),
    size=st.integers(1, 8),
    micro_batches=st.integers(1, 8),
)
def test_ranks_share_out_the_batch_without_gap_or_overlap(first, ranks, size, micro_batches):
    batch = ranks * size * micro_batches
    shares = [
        rank_samples(first, batch, data_rank=r, data_ranks=ranks, micro_batch_size=size) for r in range(ranks)
    ]
    assert all(share.shape == (size * micro_batches,) and share.dtype == np.int64 for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(first, first + batch))


def test_a_micro_batch_is_contiguous_and_ranks_alternate():
    assert rank_samples(100, 8, data_rank=1, data_ranks=2, micro_batch_size=2).tolist() == [
        102,
        103,
        106,
        107,
    ]
