"""Documents found from their last tokens, against the search on the host that training uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_davinci.kernels.document_bounds import document_bounds, found
from megatron_davinci.model.documents import document_starts
from tests.cases import cases

EOD = 3


def test_documents_are_those_that_the_host_finds(device):
    @cases(8)
    @given(st.integers(1, 4), st.integers(1, 1100), st.floats(0, 1), st.integers(0, 2**31))
    def on_any_batch(batch, length, share, seed):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(4, 9, (batch, length), generator=g)
        tokens[torch.rand(tokens.shape, generator=g) < share**4] = EOD
        starts = document_starts((tokens == EOD).numpy())
        positions = np.arange(length) - starts
        bounds = np.flatnonzero(positions == 0)
        out = document_bounds(tokens.to(device), EOD)
        assert np.array_equal(out.positions.cpu().numpy(), positions)
        assert out.number.item() == len(bounds) and out.bounds.dtype == torch.int32
        assert np.array_equal(out.bounds[: len(bounds)].cpu().numpy(), bounds)
        assert (out.bounds[len(bounds) :] == tokens.numel()).all()

    on_any_batch()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_has_no_documents(device, shape):
    out = document_bounds(torch.zeros(shape, dtype=torch.int64, device=device), EOD)
    assert out.positions.shape == shape and out.number.item() == 0 and out.bounds.tolist() == [0]


def test_sequences_that_lie_otherwise_and_are_no_tokens(device):
    tokens = torch.tensor([[1, EOD, 2], [2, 2, 2]], device=device)
    out = document_bounds(tokens.t().contiguous().t(), EOD)
    assert out.positions.tolist() == [[0, 1, 0], [0, 1, 2]] and out.bounds.tolist() == [0, 2, 3, 6, 6, 6, 6]
    with pytest.raises(ValueError, match=r"torch\.int32 \[2, 3\]"):
        document_bounds(tokens.int(), EOD)


def test_opcheck(device):
    tests = ("test_schema", "test_faketensor")
    tokens = torch.randint(5, (2, 40), device=device)
    torch.library.opcheck(found.made, (tokens, EOD), test_utils=tests)
