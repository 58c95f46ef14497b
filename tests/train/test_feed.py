"""Which samples are whose: a global batch is the same set on every layout, and on whoever reads it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.data import NativeLoader
from megatron_davinci.train.feed import rank_samples
from tests.ranks import run_ranks
from tests.tiny import LENGTH, tiny_settings, train_here


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


def train_watched(settings, path):
    """Train, and append the first and the last sample of each request to a file."""
    request = NativeLoader.request

    def watched(self, ns):
        with open(path, "a") as file:
            file.write(f"{ns[0]} {ns[-1]}\n")
        request(self, ns)

    NativeLoader.request = watched
    try:
        return train_here(settings)
    finally:
        NativeLoader.request = request


def train(root, name, stops=(None,), **loader):
    """Train, in a start for each stop; returns what was measured by step, and what was requested by start."""
    settings = tiny_settings(root, run={"directory": str(root / name), "seed": 7})
    settings["data"] = {**settings["data"], "loader": loader}
    first, second = settings["curriculum"]
    settings["curriculum"] = [
        {**first, "tokens": 12 * 8 * LENGTH},
        {**second, "tokens": 8 * 8 * LENGTH},
    ]
    requests = []
    for start, stop in enumerate(stops):
        settings["train"] = {**settings["train"], "stop_after_steps": stop}
        path = root / f"{name}-{start}"
        run_ranks(1, train_watched, settings, str(path))
        requests.append([[int(n) for n in line.split()] for line in path.read_text().splitlines()])
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["consumed_samples"], m["loss"], m["grad_norm"]) for m in lines], requests


@pytest.mark.long
def test_who_reads_and_how_far_ahead_changes_no_bit_of_a_run(tmp_path):
    threads, (requests,) = train(tmp_path, "threads", workers=0, prefetch_steps=1)
    # Step 15 is the third of batch 8 after twelve of batch 4.
    processes, (first, second) = train(tmp_path, "processes", (15, None), workers=2, prefetch_steps=3)
    assert threads == processes and len(threads) == 26
    assert first + second == requests, "each batch is asked for once, in the order of the steps"
    assert first[-1] == [64, 71] and second[0][0] == 72, "nothing is asked for past the last step of a start"
    assert requests[-1][1] + 1 == threads[-1][1]
